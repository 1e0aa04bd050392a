"""The compiled CPU kernels: csrc/cpu, reached through drope_kernels._C with raw addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels import _C
from drope_kernels.backends.addresses import (
    DTYPE_CODES,
    call_arguments,
    decode_arguments,
    packed_arguments,
    strided,
)
from drope_kernels.backends.repeated import RepeatedCall
from drope_kernels.spec.layout import (
    empty_grad_scale,
    empty_gradients,
    empty_in_order_of,
    empty_lse,
    empty_softmax_state,
)
from drope_kernels.spec.packed import ForwardResults
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, DecodeInputs

NAME = "cpu"

MAX_HEAD_DIM = 256
# Tiles of queries count keys in int32.
MAX_SEQLEN = 2**30


def unavailable() -> str | None:
    """Why this backend cannot run here at all: never, a portable instance always exists.

    Raises:
        ValueError: DROPE_CPU_ISA names an instruction set that is unknown or cannot run here.
    """
    _C.cpu_isa()
    return None


def supports(spec: AttentionSpec) -> str | None:
    """Why this backend cannot serve a call."""
    if spec.device != "cpu":
        return f"it computes on the CPU and the tensors are on {spec.device}."
    if spec.dtype not in DTYPE_CODES:
        return f"it computes float32, float16 and bfloat16, not {str(spec.dtype)[6:]}."
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        return (
            f"its head_dim is at most {MAX_HEAD_DIM}, got {spec.head_dim} (q, k) and "
            f"{spec.head_dim_v} (v)."
        )
    if max(spec.seqlen_q, spec.seqlen_kv) > MAX_SEQLEN:
        return f"its sequences have at most {MAX_SEQLEN} rows."
    return None


def served_by(spec: AttentionSpec) -> str:
    """The kernels that serve a call: tiles or lanes, and why not tiles."""
    return _C.cpu_kernels_for(
        dtype=DTYPE_CODES[spec.dtype],
        seqlen_q=spec.seqlen_q,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        softcap=spec.softcap,
        decode=spec.decode,
    )


def forward(inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), softmax_state, rotated q, k (size 0 unless kept)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    keep = save_prepared and inputs.rotation is not None
    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    lse = empty_lse(q)
    softmax_state = empty_softmax_state(q, needed=save_prepared)
    q_prepared = q.new_empty(q.shape if keep else (0,))
    k_prepared = q.new_empty(k.shape if keep else (0,))
    arguments, alive = call_arguments(inputs)
    arguments |= packed_arguments(inputs, alive)
    _C.attention_forward(
        **arguments,
        out=strided(out),
        lse=lse.data_ptr(),
        softmax_state=softmax_state.data_ptr(),
        q_prepared=q_prepared.data_ptr(),
        k_prepared=k_prepared.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    del alive
    return out, lse, softmax_state, q_prepared, k_prepared


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    softmax_state: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    need_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the order and dtype of q, k, v; dscale (B, Hq, Sq) float32, size 0 if unneeded.

    inputs.q and inputs.k are the rotated ones where the call rotates.
    """
    grad_q, grad_k, grad_v = empty_gradients(inputs, out)
    grad_scale = empty_grad_scale(inputs, needed=need_grad_scale)
    softmax_state = softmax_state.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    arguments, alive = call_arguments(inputs)
    arguments |= packed_arguments(inputs, alive)
    _C.attention_backward(
        **arguments,
        out=strided(out),
        grad_out=strided(grad_out),
        softmax_state=softmax_state.data_ptr(),
        grad_lse=0 if grad_lse is None else grad_lse.data_ptr(),
        grad_q=strided(grad_q),
        grad_k=strided(grad_k),
        grad_v=strided(grad_v),
        grad_scale=grad_scale.data_ptr() if grad_scale.numel() else 0,
        num_threads=torch.get_num_threads(),
    )
    del alive
    return grad_q, grad_k, grad_v, grad_scale


def repeated(inputs: AttentionInputs) -> RepeatedCall | None:
    """The call for other tensors like its own; it has no index tensors and no scale of rows."""
    return RepeatedCall(inputs)


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); the caches are written in place."""
    q = inputs.q
    out = empty_in_order_of(q, (*q.shape[:3], inputs.v_cache.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments, alive = decode_arguments(inputs, out, lse)
    _C.attention_decode(**arguments, num_threads=torch.get_num_threads())
    del alive
    return out, lse
