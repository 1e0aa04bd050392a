"""torch.compile: one graph per call, the same for other sizes, eager's results and strides."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest
import torch
from checker import INTERPRETED
from operands import HEAD_SCALE, ROPE, caches, on_every_backend, qkv
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import drope_kernels as dk


def gradients(function: Any, operands: list[Tensor]) -> list[Tensor]:
    out = function(*operands)
    return [out, *torch.autograd.grad(out.square().sum(), operands)]


def with_ranges(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    lengths = torch.full((q.shape[0],), 5, dtype=torch.int32)
    return dk.attention(q, k, v, kv_end=lengths, window=3, q_start=2, backend=backend)


def with_lse(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    out, lse = dk.attention(q, k, v, rope=True, scale=HEAD_SCALE, return_lse=True, backend=backend)
    return out + lse.unsqueeze(-1)


def with_length_scale(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    scale = dk.LogScale(0.2, 8)(k.shape[2], q.shape[3])
    return dk.attention(q, k, v, scale=scale, backend=backend)


def with_rows(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    rows = dk.LogScale(0.2, 4).rows(torch.arange(q.shape[2]), q.shape[3])
    return dk.attention(q, k, v, scale=rows, rope=ROPE.with_strength(0.5), backend=backend)


def with_yarn(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    rope = dk.Rope.yarn(4.0, original_max_position_embeddings=64)
    return dk.attention(q, k, v, rope=rope, backend=backend)


def with_tables(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    rope = dk.Rope(inv_freq=[[0.5, 0.1], [0.0, 0.3]])  # one row per kv head
    positions = torch.arange(q.shape[2]).expand(q.shape[0], -1) * 3
    return dk.attention(q, k, v, rope=rope, positions=positions, backend=backend)


def packed(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """The rows of the first batch row, as two sequences."""
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    ends_q, ends_k = (
        torch.stack([torch.tensor(end, dtype=torch.int32) for end in (0, 4, x.shape[2])])
        for x in (q, k)
    )
    return dk.attention_varlen(*rows, ends_q, ends_k, rope=True, backend=backend)


COMPILED = {
    "plain": dk.attention,
    "rope": functools.partial(dk.attention, rope=True),
    "ranges": with_ranges,
    "lse": with_lse,
    "length_scale": with_length_scale,
    "rows": with_rows,
    "yarn": with_yarn,
    "tables": with_tables,
    "packed": packed,
}
# The graph is the same for all: one that is built in and one that a call has to ask for.
on_two_backends = pytest.mark.parametrize("backend", ["cpu", INTERPRETED])


@pytest.mark.parametrize(
    ("backend", "name"),
    [*product(["cpu"], COMPILED), *product([INTERPRETED], ["rope", "rows", "packed"])],
)
def test_compiles_whole_with_dynamic_shapes(backend: str, name: str) -> None:
    """One graph for the call, the same graph for other sizes, eager's results and strides."""
    torch._dynamo.reset()
    eager = functools.partial(COMPILED[name], backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes are equal at first: torch would take equal ones for one symbol.
    for batch, seqlen_q, seqlen_kv in ((3, 9, 11), (5, 10, 14), (7, 6, 21)):
        operands = qkv(batch, seqlen_q, seqlen_kv)
        expected, ours = gradients(eager, operands), gradients(compiled, operands)
        for want, got in zip(expected, ours, strict=True):
            assert torch.equal(want, got)
            assert want.stride() == got.stride()
    # LogScale of a length is a number that the graph specialises on; dynamo adds an empty graph.
    num_graphs = sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)
    assert num_graphs == (3 if name == "length_scale" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    eager = functools.partial(COMPILED[name], backend="reference")
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    operands = qkv()
    for want, got in zip(gradients(eager, operands), gradients(compiled, operands), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_graph_holds_one_op_and_constant_turns() -> None:
    """Nothing about the rotation is computed at run time."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = functools.partial(dk.attention, rope=ROPE.with_strength(0.5), backend="reference")
    torch.compile(call, fullgraph=True, dynamic=True, backend=keep)(*qkv())
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("drope" in target for target in targets) == 1
    assert len(targets) < 10, targets


@on_every_backend
def test_scale_of_a_compiled_call_may_change(backend: str) -> None:
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return dk.attention(q, k, v, scale=scale, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    operands = qkv()
    for scale in (0.1, 0.25, 0.7):
        assert torch.equal(compiled(*operands, scale), call(*operands, scale))


@pytest.mark.parametrize("cache", ["raw", "rotated"])
@on_two_backends
def test_decode_compiles_whole_and_writes_the_caches(backend: str, cache: str) -> None:
    torch._dynamo.reset()
    decode = functools.partial(dk.attention_decode, rope=True, cache=cache, backend=backend)
    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend="aot_eager")
    (eager, options), (traced, _) = caches(), caches()
    torch.testing.assert_close(compiled(*traced, **options), decode(*eager, **options))
    for want, got, untouched in zip(eager, traced, caches()[0], strict=True):
        torch.testing.assert_close(got, want)
        assert torch.equal(want, untouched) == (want is eager[0])


def test_a_call_does_not_ask_which_devices_have_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of torch 2.11 cannot trace that question; later ones can."""

    def asked(device: str) -> bool:
        raise AssertionError(f"asked for {device} while a call is traced")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    q = k = v = torch.randn(1, 1, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dk.attention(q, k, v).dtype == torch.bfloat16
