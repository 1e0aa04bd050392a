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
from drope_kernels.call.direct import may_go_directly
from drope_kernels.call.dispatch import select
from drope_kernels.call.unserved import refuse_unserved, served_window
from drope_kernels.spec.layout import (
    empty_grad_scale,
    empty_gradients,
    empty_in_order_of,
    empty_lse,
    empty_softmax_state,
    is_aligned,
)
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, Rotation

_NOTHING = nullcontext()
# The arguments both ops share, in order.
_CALL = (
    "Tensor? scale_rows, float scale, bool causal, SymInt? window_left, SymInt? window_right, "
    "float? softcap, Tensor? key_mask, Tensor? mask, Tensor? alibi, "
    "Tensor? q_start, SymInt q_offset, Tensor? kv_start, Tensor? kv_end, "
    "Tensor? turns, bool interleaved, float attention_factor, "
    "Tensor? positions, Tensor? kv_positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
LIBRARY = torch.library.Library("drope", "DEF")
LIBRARY.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_CALL}, bool save_prepared, str backend)"
    " -> (Tensor out, Tensor lse, Tensor softmax_state, Tensor q_prepared, Tensor k_prepared)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor softmax_state, "
    f"Tensor q, Tensor k, Tensor v, {_CALL}, "
    "bool need_grad_scale, bool need_grad_mask, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dscale, Tensor dmask)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gather_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_rows: Tensor | None,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    key_mask: Tensor | None,
    mask: Tensor | None,
    alibi: Tensor | None,
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
    """The flat arguments of an op as `AttentionInputs`.

    Raises:
        NotImplementedError: an argument that the schema has and no backend serves yet.
    """
    refuse_unserved(key_mask=key_mask, mask=mask, alibi=alibi)
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
        served_window(window_left, window_right, causal=causal),
        softcap,
        q_offset if q_start is None else q_start,
        kv_start,
        kv_end,
        rotation,
        cu_seqlens_q,
        cu_seqlens_k,
    )


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
    softmax_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    *shared, need_grad_scale, _, backend = call
    inputs = gather_inputs(q, k, v, *shared)
    chosen = select(spec_of(inputs, needs_grad=True), backend)
    if grad_out.stride(-1) != 1:  # gradients of sums arrive expanded
        grad_out = grad_out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    with without_autocast(q.device.type):
        grads = chosen.backward(
            inputs, out, softmax_state, grad_out, grad_lse, need_grad_scale=need_grad_scale
        )
    return *grads, softmax_state.new_empty(0)  # no mask is served, so none has a gradient


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Precision inside an op is the backend's: autocast would reach the products in it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, ...]:
    *shared, save_prepared, _ = call
    rotates = gather_inputs(q, k, v, *shared).rotation is not None
    keep = save_prepared and rotates
    return (
        empty_in_order_of(q, (*q.shape[:3], v.shape[3])),
        empty_lse(q),
        empty_softmax_state(q, needed=save_prepared),
        q.new_empty(q.shape if keep else (0,)),
        q.new_empty(k.shape if keep else (0,)),
    )


def _attention_bwd_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    softmax_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *call: Any,
) -> tuple[Tensor, ...]:
    *shared, need_grad_scale, _, _ = call
    inputs = gather_inputs(q, k, v, *shared)
    dscale = empty_grad_scale(inputs, needed=need_grad_scale)
    return *empty_gradients(inputs, out), dscale, softmax_state.new_empty(0)


def attend(*arguments: Any) -> tuple[Tensor, ...]:
    """`attention_fwd`, directly where the dispatcher would do nothing."""
    if torch.compiler.is_compiling() or not may_go_directly(arguments):
        return attention_fwd(*arguments)
    return _Attention.apply(*arguments) if arguments[-2] else _attention_fwd(*arguments)


class _Attention(torch.autograd.Function):
    """The autograd kernel of attention_fwd.

    `torch.library.register_autograd` would do the same, but spends 0.2 ms per call on refilling
    default arguments of a schema this long; none of ours has defaults.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        q, k, v, *shared, _, ctx.backend = arguments
        if may_go_directly(arguments):
            output = _attention_fwd(q, k, v, *shared, True, ctx.backend)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = attention_fwd(q, k, v, *shared, True, ctx.backend)
        out, _, softmax_state, q_prepared, k_prepared = output
        if q_prepared.shape == q.shape:
            q, k = q_prepared, k_prepared
        ctx.is_tensor = [isinstance(x, Tensor) for x in shared]
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in shared]
        tensors = [x for x in shared if isinstance(x, Tensor)]
        ctx.save_for_backward(out, softmax_state, q, k, v, *tensors)
        ctx.mark_non_differentiable(softmax_state, q_prepared, k_prepared)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_out, grad_lse, *_ = grads
        out, softmax_state, q, k, v, *tensors = ctx.saved_tensors
        remaining = iter(tensors)
        shared = [
            next(remaining) if is_tensor else number
            for is_tensor, number in zip(ctx.is_tensor, ctx.numbers, strict=True)
        ]
        need_grad_scale = ctx.needs_input_grad[3]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        call = (grad_out, grad_lse, out, softmax_state, q, k, v, *shared)
        # A gradient of these gradients is refused by the op's own autograd kernel.
        direct = not torch.is_grad_enabled() and may_go_directly(call)
        backward = _attention_bwd if direct else attention_bwd
        dq, dk, dv, dscale, _ = backward(*call, need_grad_scale, False, ctx.backend)
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
