"""Calls that go past the dispatcher, or straight to their kernel, compute what the op computes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import drope_kernels as dk
from drope_kernels.call import repeat

YARN = dk.Rope.yarn(4.0, original_max_position_embeddings=64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": True},
    "yarn": {"rope": YARN},
    "full_window": {"causal": False, "window": 5},
    "scale_softcap": {"scale": 0.3, "softcap": 4.0},
    "q_start": {"q_start": -2, "rope": True},
}


class Ops(TorchDispatchMode):
    """Runs everything and writes down which ops it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Runs everything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def operands(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 9, 4, 16, generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, 11, n, generator=generator).to(dtype) for n in (16, 24))
    return [x.detach().requires_grad_() for x in (q, k, v)]


def run(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """out, lse, dq, dk, dv, and out of a call without gradients."""
    out, lse = dk.attention(*tensors, return_lse=True, **options)
    seeds = [torch.sin(torch.arange(x.numel()).view(x.shape)).to(x.dtype) for x in (out, lse)]
    grads = torch.autograd.grad([out, lse], tensors, seeds)
    with torch.no_grad():
        alone = dk.attention(*tensors, **options)
    return [out, lse, *grads, alone]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_first_call_later_calls_and_the_op_agree(name: str, dtype: torch.dtype) -> None:
    repeat.forget_all()
    options = OPTIONS[name]
    with Ops() as seen:  # its presence sends calls through the dispatcher
        expected = run(operands(1, dtype), options)
    assert any("drope.attention_fwd" in op for op in seen.names)
    assert any("drope.attention_bwd" in op for op in seen.names)
    assert not repeat._known
    run(operands(2, dtype), options)
    assert len(repeat._known) == 1
    for _ in range(2):
        for ours, theirs in zip(run(operands(1, dtype), options), expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
    assert len(repeat._known) == 1


def test_gradient_of_one_result_and_of_one_operand() -> None:
    repeat.forget_all()
    results = []
    for _ in range(2):
        q, k, v = operands(3)
        k = k.detach()
        out, lse = dk.attention(q, k, v, return_lse=True)
        (dq,) = torch.autograd.grad(lse.sum(), [q], retain_graph=True)
        (dv,) = torch.autograd.grad(out.sum(), [v])  # an expanded gradient
        results.append((dq, dv))
    assert repeat._known
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"causal": 1}, TypeError, "causal"),
        ({"window": True}, TypeError, "window"),
        ({"window": 8.0}, TypeError, "window"),
        ({"scale": True}, TypeError, "scale"),
        ({"rope": 1}, TypeError, "rope"),
        ({"q_start": False}, TypeError, "q_start"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"dropout_p": 0.1}, TypeError, "dropout_p"),
    ],
    ids=lambda x: str(x),
)
def test_a_known_call_excuses_no_other(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, k, v = operands(4)
    for _ in range(2):
        dk.attention(q, k, v, causal=True, window=8, scale=1.0, rope=True, q_start=0)
        dk.attention(q, k, v, window=1)
    with pytest.raises(error, match=message):
        dk.attention(q, k, v, **{"window": 1, **changes})


def test_other_shapes_strides_and_types_are_checked() -> None:
    q, k, v = operands(5)
    dk.attention(q, k, v)
    with pytest.raises(ValueError, match="v: expected as many rows"):
        dk.attention(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="stride 1"):
        dk.attention(q, k, v[..., ::2])
    with pytest.raises(TypeError, match="one dtype"):
        dk.attention(q, k, v.bfloat16())


def test_negated_views_are_read_as_what_they_are() -> None:
    q, k, v = (x.detach() for x in operands(6))
    negated = torch._neg_view(-q)
    assert negated.is_neg()
    for _ in range(2):
        dk.attention(q, k, v)
        assert torch.equal(dk.attention(negated, k, v), dk.attention(q, k, v))


def test_whoever_listens_hears_the_op() -> None:
    tensors = [x.detach() for x in operands(7)]
    for _ in range(2):
        plain = dk.attention(*tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dk.attention(*tensors)
    assert "drope::attention_fwd" in {event.key for event in profile.key_averages()}
    with Functions():
        assert torch.equal(dk.attention(*tensors), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert dk.attention(*tensors).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: dk.attention(q, *tensors[1:]), (tensors[0],), (tensors[0],))


def test_second_gradients_are_refused() -> None:
    for _ in range(2):
        q, k, v = operands(8)
        (dq,) = torch.autograd.grad(dk.attention(q, k, v).sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="expected one backward pass"):
            dq.sum().backward()


def test_changed_operands_are_noticed() -> None:
    for _ in range(2):
        q, k, v = operands(9)
        copy = v * 1.0
        out = dk.attention(q, k, copy)
        copy.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_known_call_keeps_none_of_its_tensors() -> None:
    repeat.forget_all()
    tensors = operands(10)
    dk.attention(*tensors, rope=YARN).sum().backward()
    assert repeat._known
    references = [weakref.ref(x) for x in tensors]
    del tensors
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_few_calls_are_remembered() -> None:
    repeat.forget_all()
    for length in range(1, repeat._MOST + 20):
        x = torch.ones(1, 1, length, 8)
        dk.attention(x, x, x)
    assert 0 < len(repeat._known) <= repeat._MOST
    repeat.forget_all()
