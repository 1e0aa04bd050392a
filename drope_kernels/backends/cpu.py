"""The compiled CPU kernels: csrc/cpu, reached through drope_kernels._C with raw addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drope_kernels import _C
from drope_kernels.layout import empty_grad_scale, empty_gradients, empty_in_order_of
from drope_kernels.packed import join_backward, join_forward
from drope_kernels.spec import AttentionInputs, AttentionSpec

NAME = "cpu"

MAX_HEAD_DIM = 256
# Tiles of queries count keys in int32.
MAX_SEQLEN = 2**30

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType, attention_params.h


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
    if spec.dtype not in _DTYPE_CODES:
        return f"it computes float32, float16 and bfloat16, not {str(spec.dtype)[6:]}."
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        return (
            f"its head_dim is at most {MAX_HEAD_DIM}, got {spec.head_dim} (q, k) and "
            f"{spec.head_dim_v} (v)."
        )
    if max(spec.seqlen_q, spec.seqlen_kv) > MAX_SEQLEN:
        return f"its sequences have at most {MAX_SEQLEN} rows."
    return None


def forward(
    inputs: AttentionInputs, *, save_prepared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), rotated q and k (size 0 unless kept)."""
    if inputs.cu_seqlens_q is not None:
        return join_forward(inputs, forward, save_prepared=save_prepared)
    q, k, v = inputs.q, inputs.k, inputs.v
    keep = save_prepared and inputs.rotation is not None
    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q_prepared = q.new_empty(q.shape if keep else (0,))
    k_prepared = q.new_empty(k.shape if keep else (0,))
    arguments, alive = call_arguments(inputs)
    _C.attention_forward(
        **arguments,
        out=strided(out),
        lse=lse.data_ptr(),
        q_prepared=q_prepared.data_ptr(),
        k_prepared=k_prepared.data_ptr(),
    )
    del alive
    return out, lse, q_prepared, k_prepared


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    need_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the order and dtype of q, k, v; dscale (B, Hq, Sq) float32, size 0 if unneeded.

    inputs.q and inputs.k are the rotated ones where the call rotates.
    """
    if inputs.cu_seqlens_q is not None:
        return join_backward(
            inputs, out, lse, grad_out, grad_lse, backward, need_grad_scale=need_grad_scale
        )
    grad_q, grad_k, grad_v = empty_gradients(inputs, out)
    grad_scale = empty_grad_scale(inputs, lse, needed=need_grad_scale)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    arguments, alive = call_arguments(inputs)
    _C.attention_backward(
        **arguments,
        out=strided(out),
        grad_out=strided(grad_out),
        lse=lse.data_ptr(),
        grad_lse=0 if grad_lse is None else grad_lse.data_ptr(),
        grad_q=strided(grad_q),
        grad_k=strided(grad_k),
        grad_v=strided(grad_v),
        grad_scale=grad_scale.data_ptr() if grad_scale.numel() else 0,
    )
    del alive
    return grad_q, grad_k, grad_v, grad_scale


def strided(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of batch, head and row."""
    if x is None:
        return 0, 0, 0, 0
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def call_arguments(inputs: AttentionInputs) -> tuple[dict[str, Any], list[Tensor]]:
    """What forward and backward calls of _C share, and the tensors to keep alive meanwhile."""
    q, v = inputs.q, inputs.v
    batch, heads_q, seqlen_q, head_dim = q.shape
    _, heads_kv, seqlen_kv, head_dim_v = v.shape
    alive: list[Tensor] = []

    def address(x: Tensor | None, dtype: torch.dtype) -> int:
        if x is None:
            return 0
        alive.append(x.to(dtype).contiguous())
        return alive[-1].data_ptr()

    scale = inputs.scale
    q_start = inputs.q_start
    if not isinstance(q_start, Tensor):
        q_start = torch.full((batch,), q_start, dtype=torch.int32)
    rotation = inputs.rotation
    arguments: dict[str, Any] = {
        "dtype": _DTYPE_CODES[q.dtype],
        "shape": (batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v),
        "q": strided(q),
        "k": strided(inputs.k),
        "v": strided(v),
        "scale": 0.0 if isinstance(scale, Tensor) else scale,
        "scale_rows": strided(scale if isinstance(scale, Tensor) else None),
        "softcap": inputs.softcap or 0.0,
        "causal": inputs.causal,
        "window": inputs.window or 0,
        "q_start": address(q_start, torch.int32),
        "kv_start": address(inputs.kv_start, torch.int32),
        "kv_end": address(inputs.kv_end, torch.int32),
        "rotary_dim": 0 if rotation is None else rotation.dim,
        "interleaved": rotation is not None and rotation.interleaved,
        "attention_factor": 1.0 if rotation is None else rotation.attention_factor,
        "num_tables": 0 if rotation is None else rotation.turns.shape[1],
        "turns_hi": 0 if rotation is None else address(rotation.turns[0], torch.float32),
        "turns_lo": 0 if rotation is None else address(rotation.turns[1], torch.float32),
        "positions": 0 if rotation is None else address(rotation.positions, torch.float32),
        "kv_positions": 0 if rotation is None else address(rotation.kv_positions, torch.float32),
        "stride_positions_batch": seqlen_q,
        "stride_kv_positions_batch": seqlen_kv,
        "num_threads": torch.get_num_threads(),
    }
    return arguments, alive
