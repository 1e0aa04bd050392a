"""Torch citizenship of the op pair: opcheck, checkpointing, autocast, selection."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from operands import BACKENDS, HEAD_SCALE, ROPE, caches, int32, on_every_backend, qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import drope_kernels as dk
from drope_kernels.call import dispatch


def transposed(x: Tensor) -> Tensor:
    """The same values in (B, S, H, D) memory, as a leaf."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


CALLS = {
    "plain": {},
    "full": {"causal": False, "scale": 0.3},
    "rope": {"rope": True},
    "rope_rows": {"rope": ROPE, "scale": torch.full((2, 4, 9), 0.3), "softcap": 5.0},
    "positions": {"rope": ROPE, "positions": torch.arange(18).view(2, 9)},
    "ranges": {
        "kv_start": int32(0, 3),
        "kv_end": int32(11, 5),
        "window": 4,
        "q_start": int32(2, 1),
    },
    "head_scale": {
        "scale": HEAD_SCALE,
        "rope": dk.Rope.yarn(4, original_max_position_embeddings=32),
    },
}


class Recorder(TorchDispatchMode):
    """Keeps the arguments and results of every drope op below it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "drope":
            self.calls.append((func, args, result))
        return result


def recorded(operands: list[Tensor], backend: str, **options: Any) -> Recorder:
    """The forward op call of one `attention`, and its backward."""
    with Recorder() as recorder:
        out, lse = dk.attention(*operands, return_lse=True, backend=backend, **options)
        if out.requires_grad:
            (out.sum() + lse.where(lse.isfinite(), 0.0).sum()).backward()
    return recorder


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


# --- opcheck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@on_every_backend
def test_opcheck_forward_and_backward(backend: str, name: str) -> None:
    """Schema, fakes with strides, autograd registration, ahead-of-time autograd, for both ops."""
    options = CALLS[name]
    if isinstance(options.get("scale"), Tensor):
        options = {**options, "scale": options["scale"].clone().requires_grad_()}
    recorder = recorded(qkv(), backend, **options)
    (forward, forward_args, _), (backward, backward_args, _) = recorder.calls
    leaves = [x.detach().requires_grad_() for x in forward_args[:3]]
    rows = forward_args[3]
    rows = None if rows is None else rows.detach().clone().requires_grad_()
    torch.library.opcheck(forward, (*leaves, rows, *forward_args[4:]))
    torch.library.opcheck(backward, detached(backward_args))


@on_every_backend
def test_opcheck_transposed_and_packed(backend: str) -> None:
    q, k, v = (transposed(x) for x in qkv())
    recorder = recorded([q, k, v], backend, rope=True)
    (forward, args, _), (backward, backward_args, _) = recorder.calls
    torch.library.opcheck(forward, (q, k, v, *args[3:]))
    torch.library.opcheck(backward, detached(backward_args))
    q, k, v = (x[0].detach().transpose(0, 1).requires_grad_() for x in (q, k, v))
    with Recorder() as recorder:
        ends_q, ends_k = int32(0, 4, 4, 9), int32(0, 6, 8, 11)
        dk.attention_varlen(q, k, v, ends_q, ends_k, rope=True, backend=backend).sum().backward()
    for op, args, _ in recorder.calls:
        torch.library.opcheck(op, detached(args))


@pytest.mark.parametrize("cache", ["raw", "rotated"])
@on_every_backend
def test_opcheck_decode(backend: str, cache: str) -> None:
    """Schema and aliases (caches written, nothing else), fakes with strides, functionalisation."""
    (q, k_cache, v_cache), options = caches()
    options |= {"rope": ROPE, "cache": cache, "backend": backend, "scale": HEAD_SCALE}
    k_pages, v_pages = (
        x.unflatten(2, (4, 4)).transpose(1, 2).flatten(0, 1) for x in (k_cache, v_cache)
    )
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    with Recorder() as recorder:
        dk.attention_decode(q, k_cache, v_cache, **options)
        dk.attention_decode(q, k_pages, v_pages, page_table=table, **options)
        transposed_q = transposed(q).detach()
        nothing_new = {"cache_seqlens": int32(3, 9), "window": 4, "kv_start": int32(0, 2)}
        dk.attention_decode(transposed_q, k_cache, v_cache, backend=backend, **nothing_new)
    assert [op for op, _, _ in recorder.calls] == [torch.ops.drope.attention_decode.default] * 3
    for op, arguments, _ in recorder.calls:
        torch.library.opcheck(op, arguments)


# --- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@on_every_backend
def test_checkpointing_gives_identical_gradients(backend: str, use_reentrant: bool) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dk.attention(q * 2, k, v, rope=ROPE, scale=HEAD_SCALE, backend=backend).tanh()

    def through_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(layer, q, k, v, use_reentrant=use_reentrant)

    def backward(function: Any) -> list[Tensor]:
        # More queries than the CPU sums in another order where there is no gradient, as there is
        # none in the first forward of a reentrant checkpoint.
        operands = [x.detach().repeat(1, 1, 2, 1).requires_grad_() for x in qkv()]
        function(*operands).square().sum().backward()
        return [x.grad for x in operands]

    for want, got in zip(backward(layer), backward(through_checkpoint), strict=True):
        assert torch.equal(want, got)


def test_prepared_tensors_are_kept_only_for_a_backward_with_rope() -> None:
    def sizes(operands: list[Tensor], **options: Any) -> list[int]:
        _, _, results = recorded(operands, "reference", **options).calls[0]
        return [results[3].numel(), results[4].numel()]

    operands = qkv()
    constant = [x.detach() for x in operands]
    assert sizes(operands, rope=True) == [operands[0].numel(), operands[1].numel()]
    assert sizes([*constant[:2], operands[2]], rope=True) == sizes(operands, rope=True)
    assert sizes(constant, rope=True) == [0, 0]
    assert sizes(operands) == [0, 0]
    with torch.no_grad():
        assert sizes(operands, rope=True) == [0, 0]
    scale = HEAD_SCALE.clone().requires_grad_()
    assert sizes(constant, rope=True, scale=scale)[0] == operands[0].numel()


@pytest.mark.parametrize("rope", [False, True])
@on_every_backend
def test_gradients_lie_in_memory_as_their_inputs_do(backend: str, rope: bool) -> None:
    """Also behind a rotation, whose saved q' and k' are contiguous whatever q and k were."""
    operands = [transposed(x) for x in qkv()]
    out = dk.attention(*operands, rope=rope, backend=backend)
    grads = torch.autograd.grad(out.sum(), operands)
    for x, like in zip((out, *grads), (operands[0], *operands), strict=True):
        assert x.transpose(1, 2).is_contiguous()
        assert x.shape[:3] == like.shape[:3]


def test_prepared_tensors_are_not_part_of_the_graph() -> None:
    recorder = recorded(qkv(), "reference", rope=True)
    _, arguments, _ = recorder.calls[0]
    operands = [x.detach().requires_grad_() for x in arguments[:3]]
    out, lse, *prepared = torch.ops.drope.attention_fwd(*operands, *arguments[3:])
    assert out.requires_grad
    assert lse.requires_grad
    assert not any(x.requires_grad for x in prepared)


def test_gradient_of_the_lse_alone() -> None:
    operands = [x.double().detach().requires_grad_() for x in qkv(1, 3, 4)]

    def lse(*operands: Tensor) -> Tensor:
        return dk.attention(*operands, rope=ROPE, return_lse=True)[1]

    assert torch.autograd.gradcheck(lse, operands)


def test_gradcheck_of_everything_at_once() -> None:
    """float64 finite differences through rope, softcap, window, ranges, empty rows, row scales."""
    operands = [x.double().detach().requires_grad_() for x in qkv(2, 3, 5)]
    table = [[0.7, 0.1, 0.0], [0.0, 0.4, 0.2]]
    rope = dk.Rope(inv_freq=table, attention_factor=1.3, interleaved=True)
    scale = (torch.rand(2, 4, 3, dtype=torch.float64) + 0.3).requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dk.attention(
            q,
            k,
            v,
            scale=scale,
            rope=rope,
            softcap=2.0,
            window=3,
            kv_end=int32(5, 0),
            kv_start=int32(1, 0),
            return_lse=True,
        )
        return out, lse[:1]

    assert torch.autograd.gradcheck(call, (*operands, scale))


@on_every_backend
def test_double_backward_is_refused(backend: str) -> None:
    operands = qkv()
    out = dk.attention(*operands, rope=True, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), operands[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_inference_mode_does_not_poison_later_training() -> None:
    """Cached rotation tables must not be inference tensors."""
    rope = dk.Rope(theta=321.0)
    with torch.inference_mode():
        dk.attention(*qkv(), rope=rope)
    operands = qkv()
    dk.attention(*operands, rope=rope).sum().backward()
    assert all(x.grad is not None for x in operands)


# --- autocast ------------------------------------------------------------------------------------


@on_every_backend
def test_autocast_casts_q_k_v_and_nothing_else(backend: str) -> None:
    """Positions near 1e6 and scales keep their precision, gradients come back in float32."""
    operands = qkv()
    positions = torch.arange(18, dtype=torch.float32).view(2, 9) + 1_000_001
    options = {"rope": True, "positions": positions, "scale": HEAD_SCALE, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        out = dk.attention(*operands, **options)
    low = [x.detach().bfloat16().requires_grad_() for x in operands]
    expected = dk.attention(*low, **options)
    assert torch.equal(out, expected)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    expected.float().sum().backward()
    for ours, theirs in zip(operands, low, strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad.float())


def test_autocast_unites_mixed_dtypes() -> None:
    """As torch's own attention does: norms leave q and k in float32, a projection v in bfloat16."""
    q, k, v = (x.detach() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        out = dk.attention(q, k, v.bfloat16())
        assert torch.equal(out, dk.attention(q, k, v))
        lengths = int32(0, q.shape[2]), int32(0, k.shape[2])
        packed = (x[0].transpose(0, 1) for x in (q, k.bfloat16(), v))
        assert dk.attention_varlen(*packed, *lengths).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone() -> None:
    operands = [x.detach().double() for x in qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        assert dk.attention(*operands).dtype == torch.float64


# --- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@on_every_backend
def test_a_window_wider_than_any_index_is_none(backend: str, causal: bool) -> None:
    for start in (2, -4):
        options = {"causal": causal, "q_start": start, "backend": backend}
        expected = dk.attention(*qkv(), **options)
        assert torch.equal(dk.attention(*qkv(), window=sys.maxsize, **options), expected)


def test_meta_tensors_give_meta_results() -> None:
    q, k, v = (x.detach().to("meta") for x in qkv())
    out, lse = dk.attention(q, k, v, rope=True, return_lse=True)
    assert (out.shape, out.device.type) == ((*q.shape[:3], v.shape[3]), "meta")
    assert lse.shape == q.shape[:3]


# --- selection -----------------------------------------------------------------------------------


def test_explain_names_the_backend_that_runs_and_why_not_the_others() -> None:
    q, k, v = (x.detach().double() for x in qkv())
    text = dk.explain(q, k, v, rope=ROPE, window=3).splitlines()
    assert text[0].startswith("attention on cpu, float64, B=2 Hq=4 Hkv=2 Sq=9 Skv=11 D=16 Dv=12")
    for trait in ("causal", "rope over 8 channels", "window"):
        assert trait in text[0]
    lines = dict(line.split(": ", 1) for line in text[1:])
    assert list(lines) == ["cuda", "triton", "cpu", "reference"]
    for name in ("cuda", "triton"):
        assert lines[name] == "no, it computes on CUDA devices and the tensors are on cpu."
    assert "float64" in lines["cpu"]
    assert lines["reference"] == "runs this call"
    asked = dk.explain(*qkv(), backend="reference").splitlines()
    assert asked[-1] == "reference: runs this call"
    assert all('not asked for: backend="reference"' in line for line in asked[1:-1])


def test_explain_reads_the_deterministic_switch() -> None:
    torch.use_deterministic_algorithms(False)
    assert "deterministic" not in dk.explain(*qkv())
    torch.use_deterministic_algorithms(True)
    assert "deterministic" in dk.explain(*qkv())


def test_explain_refuses_what_attention_refuses() -> None:
    with pytest.raises(TypeError, match="dropout"):
        dk.explain(*qkv(), dropout=0.1)
    with pytest.raises(ValueError, match="window"):
        dk.explain(*qkv(), window=0)


def test_named_backend_that_cannot_serve_says_why() -> None:
    operands = [x.detach().double() for x in qkv()]
    for backend in BACKENDS:
        if backend != "reference":
            with pytest.raises(ValueError, match=rf'"{backend}".*float64'):
                dk.attention(*operands, backend=backend)
    with pytest.raises(ValueError, match=r"one of .*reference"):
        dk.attention(*operands, backend="cudnn")


def test_auto_warns_once_when_only_the_reference_is_left() -> None:
    dispatch._warn_reference.cache_clear()
    wide = [torch.randn(1, 1, 2, 1024) for _ in range(3)]
    with pytest.warns(dispatch.BackendWarning, match="reference"):
        dk.attention(*wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.attention(*wide)
        dk.attention(*(x.double() for x in wide))
