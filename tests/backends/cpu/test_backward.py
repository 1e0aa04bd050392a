"""The CPU backward on every instruction set: shapes around its tiles, every feature, any threads.

The named cases of test_attention cover what a call can mean, on the best instruction set. Here are
the sizes at which tiles, kv blocks, key groups and vectors of channels begin and end, which differ
from one instruction set to the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import oracle
import peer
import pytest
import torch
from calls import make_call
from cases import BY_NAME, Case, RopeCase
from checker import compare
from torch import Tensor

from drope_kernels import attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference backend in float64, and torch in the same precision."""
    call = make_call(case, dtype)
    return call.to(torch.float64).run("reference"), oracle.run(call, peer.attend)


def check(case: Case, dtype: torch.dtype) -> None:
    call = make_call(case, dtype)
    compare(call, call.run("cpu"), *expected(case, dtype))


def shaped(name: str, **sizes: object) -> Case:
    return replace(Case(name, batch=1, head_dim=64), **sizes)  # type: ignore[arg-type]


SHAPES = (
    *(shaped(f"causal_{n}", seqlen_q=n, seqlen_kv=n) for n in (63, 111, 300)),
    *(shaped(f"full_{n}", seqlen_q=n, seqlen_kv=n, causal=False) for n in (63, 111, 300)),
    shaped("few_queries", seqlen_q=5, seqlen_kv=300),
    shaped("few_keys", seqlen_q=300, seqlen_kv=5, causal=False),
    shaped("head_dim_1", seqlen_q=70, seqlen_kv=70, head_dim=1),
    shaped("head_dim_2_values_1", seqlen_q=70, seqlen_kv=70, head_dim=2, head_dim_v=1),
    # 5, 6, 7 and 9 vectors of 16 channels: every way to cut channels into products.
    *(shaped(f"head_dim_{d}", seqlen_q=100, seqlen_kv=100, head_dim=d) for d in (72, 96, 112, 144)),
    shaped("wide_values", seqlen_q=100, seqlen_kv=100, head_dim=33, head_dim_v=256),
)

FEATURES = (
    shaped("group", seqlen_q=150, seqlen_kv=150, num_heads_q=6, num_heads_kv=2, scale="row"),
    shaped("window", seqlen_q=300, seqlen_kv=300, window=50),
    shaped("window_full", seqlen_q=300, seqlen_kv=300, window=50, causal=False),
    shaped("ranges", batch=2, seqlen_q=200, seqlen_kv=200, kv_start=(0, 33), kv_end=(150, 200)),
    shaped("first_queries_empty", seqlen_q=100, seqlen_kv=150, q_start=-60),
    shaped("softcap", seqlen_q=150, seqlen_kv=150, softcap=2.0, scale="row", window=40),
    shaped("rope", seqlen_q=150, seqlen_kv=150, rope=RopeCase(attention_factor=1.3, dim=42)),
    shaped("rope_interleaved", seqlen_q=150, seqlen_kv=150, rope=RopeCase(interleaved=True)),
    shaped("transposed", batch=2, seqlen_q=130, seqlen_kv=130, layout="bshd"),
    shaped("expanded", batch=2, seqlen_q=130, seqlen_kv=130, layout="expanded_heads"),
)


@pytest.mark.parametrize("case", SHAPES + FEATURES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients(isa: str, dtype: torch.dtype, case: Case) -> None:
    check(case, dtype)


@pytest.mark.parametrize("name", ["huge_entries", "every_row_empty", "right_padded", "length_1"])
def test_extremes(isa: str, name: str) -> None:
    check(BY_NAME[name], torch.bfloat16)


def test_float16(isa: str) -> None:
    case = shaped("float16", seqlen_q=111, seqlen_kv=111, rope=RopeCase(), scale="row")
    check(case, torch.float16)


@pytest.mark.parametrize(
    "case",
    [
        shaped("one_head", seqlen_q=1500, seqlen_kv=1500, num_heads_q=1, num_heads_kv=1),
        shaped("many_heads", batch=4, seqlen_q=200, seqlen_kv=200, num_heads_q=8, num_heads_kv=8),
        shaped("groups", seqlen_q=700, seqlen_kv=700, num_heads_q=4, rope=RopeCase(), scale="row"),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_numbers_on_any_threads(dtype: torch.dtype, case: Case) -> None:
    """A head is cut into parts by its shape alone, and the parts are added in one order."""
    call = make_call(case, dtype)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3, 7):
        torch.set_num_threads(num_threads)
        results.append(call.run("cpu"))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, once in results[0].items():
            assert torch.equal(other[name], once), name


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv", "batch"), [(0, 9, 2), (9, 0, 2), (5, 5, 0)])
def test_nothing_to_attend_to_gives_zero_gradients(
    isa: str, seqlen_q: int, seqlen_kv: int, batch: int
) -> None:
    q = torch.randn(batch, 2, seqlen_q, 16, requires_grad=True)
    k, v = (torch.randn(batch, 2, seqlen_kv, 16, requires_grad=True) for _ in range(2))
    scale = torch.full((2, 1), 0.3, requires_grad=True)
    out = attention(q, k, v, scale=scale, causal=False, backend="cpu")
    out.backward(torch.ones_like(out))
    for leaf in (q, k, v, scale):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_keys_outside_the_range_may_be_nan(isa: str) -> None:
    """A static cache holds whatever was in memory behind its last key."""
    q, k, v = (torch.randn(1, 2, 40, 24) for _ in range(3))
    k[:, :, 30:], v[:, :, 30:] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kv_end = torch.tensor([30], dtype=torch.int32)
    out = attention(*leaves, causal=False, kv_end=kv_end, backend="cpu")
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()
    assert grad[:, :, 30:].count_nonzero() == 0


def test_long_rows_lose_no_bits(isa: str) -> None:
    """500 kv blocks: sums that ran through all of them in one register were 5 times less exact."""
    generator = torch.Generator().manual_seed(0)
    rows, keys = (torch.randn(1, 1, n, 64, generator=generator) for n in (48, 65536))
    inputs = (rows, keys, keys.flip(2), rows.flip(2))

    def gradients(dtype: torch.dtype, attend: Attend) -> tuple[Tensor, ...]:
        *leaves, grad_out = (x.to(dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        return torch.autograd.grad(attend(*leaves), leaves, grad_out)

    def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v

    truth = gradients(torch.float64, in_torch)
    ours = gradients(torch.float32, functools.partial(attention, causal=False, backend="cpu"))
    peers = gradients(torch.float32, in_torch)
    for name, got, same_precision, want in zip("qkv", ours, peers, truth, strict=True):
        limit = 2 * (same_precision - want).norm() + 5e-7 * want.norm()
        assert (got - want).norm() <= limit, f"d{name} at 65536 keys"
