"""The op pair `drope::attention_fwd`, `drope::attention_bwd`: what torch sees of a call.

Inputs and results are tensors, numbers and None only, so tracing, compilation, checkpointing and
autograd work as for torch's own ops. Backends are chosen inside, at run time, from real sizes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from drope_kernels.call.check_values import check_values
from drope_kernels.call.dispatch import select
from drope_kernels.spec.layout import (
    empty_grad_scale,
    empty_gradients,
    empty_in_order_of,
    is_aligned,
)
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, Rotation

_NOTHING = nullcontext()
_WIDEST_WINDOW = 2**40  # beyond any two indices; wider ones would overflow an int64 sum with one
# The arguments both ops share, in order.
_CALL = (
    "Tensor? scale_rows, float scale, bool causal, SymInt? window, float? softcap, "
    "Tensor? q_start, SymInt q_offset, Tensor? kv_start, Tensor? kv_end, "
    "Tensor? turns, bool interleaved, float attention_factor, "
    "Tensor? positions, Tensor? kv_positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
LIBRARY = torch.library.Library("drope", "DEF")
LIBRARY.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_CALL}, bool save_prepared, str backend)"
    " -> (Tensor out, Tensor lse, Tensor q_prepared, Tensor k_prepared)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, "
    f"Tensor q, Tensor k, Tensor v, {_CALL}, bool need_grad_scale, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gather_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_rows: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    q_start: Tensor | None,
    q_offset: int,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    turns: Tensor | None,
    interleaved: bool,
    attention_factor: float,
    positions: Tensor | None,
    kv_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> AttentionInputs:
    """The flat arguments of an op as `AttentionInputs`."""
    rotation = None
    if turns is not None:
        rotation = Rotation(
            turns, interleaved, attention_factor, _as_float(positions), _as_float(kv_positions)
        )
    return AttentionInputs(
        q,
        k,
        v,
        scale if scale_rows is None else scale_rows,
        causal,
        clamp_window(window),
        softcap,
        q_offset if q_start is None else q_start,
        kv_start,
        kv_end,
        rotation,
        cu_seqlens_q,
        cu_seqlens_k,
    )


def clamp_window(window: int | None) -> int | None:
    """No window is wider than any two indices are apart."""
    return None if window is None else torch.sym_min(window, _WIDEST_WINDOW)


def _as_float(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.to(torch.float32)


def spec_of(inputs: AttentionInputs, *, needs_grad: bool) -> AttentionSpec:
    """What backend selection may look at."""
    batch, num_heads_q, seqlen_q, head_dim = inputs.q.shape
    _, num_heads_kv, seqlen_kv, head_dim_v = inputs.v.shape
    rotation = inputs.rotation
    return AttentionSpec(
        device=inputs.q.device.type,
        device_index=inputs.q.device.index or 0,
        dtype=inputs.q.dtype,
        batch=batch,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=inputs.causal,
        window=inputs.window is not None,
        softcap=inputs.softcap is not None,
        kv_range=inputs.kv_start is not None or inputs.kv_end is not None,
        row_scale=isinstance(inputs.scale, Tensor),
        rotary_dim=0 if rotation is None else rotation.dim,
        interleaved=rotation is not None and rotation.interleaved,
        varlen=inputs.cu_seqlens_q is not None,
        decode=False,
        needs_grad=needs_grad,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        aligned=all(is_aligned(x) for x in (inputs.q, inputs.k, inputs.v)),
    )


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, ...]:
    *shared, save_prepared, backend = call
    inputs = gather_inputs(q, k, v, *shared)
    check_values(inputs, positions=shared[-4], kv_positions=shared[-3])
    chosen = select(spec_of(inputs, needs_grad=save_prepared), backend)
    with without_autocast(q.device.type):
        return chosen.forward(inputs, save_prepared=save_prepared)


def _attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    *shared, need_grad_scale, backend = call
    inputs = gather_inputs(q, k, v, *shared)
    chosen = select(spec_of(inputs, needs_grad=True), backend)
    if grad_out.stride(-1) != 1:  # gradients of sums arrive expanded
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    with without_autocast(q.device.type):
        return chosen.backward(
            inputs, out, lse, grad_out, grad_lse, need_grad_scale=need_grad_scale
        )


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Precision inside an op is the backend's: autocast would reach the products in it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, ...]:
    save = call[-2] and call[9] is not None  # save_prepared, turns
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        empty_in_order_of(q, (*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape[:3], dtype=lse_dtype),
        q.new_empty(q.shape if save else (0,)),
        q.new_empty(k.shape if save else (0,)),
    )


def _attention_bwd_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    *shared, need_grad_scale, _ = call
    inputs = gather_inputs(q, k, v, *shared)
    return *empty_gradients(inputs, out), empty_grad_scale(inputs, lse, needed=need_grad_scale)


class _Attention(torch.autograd.Function):
    """The autograd kernel of attention_fwd.

    `torch.library.register_autograd` would do the same, but spends 0.2 ms per call on refilling
    default arguments of a schema this long; none of ours has defaults.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output = attention_fwd(*arguments)
        q, k, v, *shared, _, ctx.backend = arguments
        out, lse, q_prepared, k_prepared = output
        if q_prepared.shape == q.shape:
            q, k = q_prepared, k_prepared
        ctx.is_tensor = [isinstance(x, Tensor) for x in shared]
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in shared]
        ctx.save_for_backward(out, lse, q, k, v, *(x for x in shared if isinstance(x, Tensor)))
        ctx.mark_non_differentiable(q_prepared, k_prepared)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out, grad_lse, _, _ = grads
        out, lse, q, k, v, *tensors = ctx.saved_tensors
        remaining = iter(tensors)
        shared = [
            next(remaining) if is_tensor else number
            for is_tensor, number in zip(ctx.is_tensor, ctx.numbers, strict=True)
        ]
        need_grad_scale = ctx.needs_input_grad[3]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, dscale = attention_bwd(
            grad_out, grad_lse, out, lse, q, k, v, *shared, need_grad_scale, ctx.backend
        )
        unused = [None] * (len(shared) + 1)  # all but scale_rows, and save_prepared, backend
        return dq, dk, dv, dscale if need_grad_scale else None, *unused


def _attention_fwd_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    differentiable = [x for x in arguments[:4] if x is not None]  # q, k, v, scale_rows
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    # Neither has a rule here: the first would fail obscurely, the second lose the tangent.
    if (needs_grad and torch._C._are_functorch_transforms_active()) or any(
        unpack_dual(x).tangent is not None for x in differentiable
    ):
        raise NotImplementedError(
            "attention: expected gradients by torch.autograd, got a torch.func transform or "
            "forward-mode differentiation; use torch.autograd.grad, or torch's "
            "scaled_dot_product_attention in math mode"
        )
    if needs_grad:
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_fwd(*arguments)


def _no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "attention: expected one backward pass, got a backward through its gradients (double "
        "backward); use torch's scaled_dot_product_attention in math mode for create_graph=True"
    )


LIBRARY.impl("attention_fwd", _attention_fwd, "CompositeExplicitAutograd")
LIBRARY.impl("attention_fwd", _attention_fwd_autograd, "Autograd")
LIBRARY.impl("attention_bwd", _attention_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("drope::attention_fwd", _attention_fwd_fake, lib=LIBRARY)
torch.library.register_fake("drope::attention_bwd", _attention_bwd_fake, lib=LIBRARY)
torch.library.register_autograd("drope::attention_bwd", _no_double_backward, lib=LIBRARY)

attention_fwd = torch.ops.drope.attention_fwd.default
attention_bwd = torch.ops.drope.attention_bwd.default
