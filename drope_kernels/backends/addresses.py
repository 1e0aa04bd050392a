"""What calls of the compiled kernels are made of: addresses, element strides and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drope_kernels.spec.spec import AttentionInputs, DecodeInputs

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType, attention_params.h


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
    if isinstance(scale, Tensor):
        alive.append(scale)
    q_start = inputs.q_start
    rotation = inputs.rotation
    arguments: dict[str, Any] = {
        "dtype": DTYPE_CODES[q.dtype],
        "shape": (batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v),
        "q": strided(q),
        "k": strided(inputs.k),
        "v": strided(v),
        "scale": 0.0 if isinstance(scale, Tensor) else scale,
        "scale_rows": strided(scale if isinstance(scale, Tensor) else None),
        "softcap": inputs.softcap or 0.0,
        "causal": inputs.causal,
        "window": inputs.window or 0,
        "q_start": address(q_start if isinstance(q_start, Tensor) else None, torch.int32),
        "q_offset": 0 if isinstance(q_start, Tensor) else q_start,
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
    }
    return arguments, alive


def packed_arguments(inputs: AttentionInputs, alive: list[Tensor]) -> dict[str, int]:
    """Of packed calls; zeros in others."""
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        return {"cu_seqlens_q": 0, "cu_seqlens_k": 0, "num_seqs": 0}
    ends_q, ends_k = inputs.cu_seqlens_q.contiguous(), inputs.cu_seqlens_k.contiguous()
    alive += [ends_q, ends_k]
    return {
        "cu_seqlens_q": ends_q.data_ptr(),
        "cu_seqlens_k": ends_k.data_ptr(),
        "num_seqs": ends_q.shape[0] - 1,
    }


def decode_arguments(
    inputs: DecodeInputs, out: Tensor, lse: Tensor
) -> tuple[dict[str, Any], list[Tensor]]:
    """What decode calls of _C share, and the tensors to keep alive meanwhile."""
    arguments, alive = call_arguments(_without_append(inputs))
    batch, heads_q, seqlen_q, head_dim = inputs.q.shape
    heads_kv, rows, head_dim_v = inputs.v_cache.shape[1:]
    lengths, table, num_pages = inputs.cache_seqlens.contiguous(), inputs.page_table, 0
    alive.append(lengths)
    if table is not None:
        table, num_pages = table.contiguous(), inputs.k_cache.shape[0]
        alive.append(table)
    arguments |= {
        "shape": (batch, heads_q, heads_kv, seqlen_q, inputs.capacity, head_dim, head_dim_v),
        "rotated_cache": inputs.rotated_cache,
        "cache_seqlens": lengths.data_ptr(),
        "page_table": 0 if table is None else table.data_ptr(),
        "stride_page_table_batch": 0 if table is None else table.stride(0),
        "pages": (num_pages, rows, 0) if table is None else (num_pages, rows, table.shape[1]),
        "seqlen_new": inputs.num_new,
        "k_new": strided(inputs.k),
        "v_new": strided(inputs.v),
        "out": strided(out),
        "lse": lse.data_ptr(),
    }
    return arguments, alive


def _without_append(inputs: DecodeInputs) -> AttentionInputs:
    """What decode has in common with attention; k and v are the caches."""
    return AttentionInputs(
        q=inputs.q,
        k=inputs.k_cache,
        v=inputs.v_cache,
        scale=inputs.scale,
        causal=True,
        window=inputs.window,
        softcap=inputs.softcap,
        q_start=0,
        kv_start=inputs.kv_start,
        kv_end=None,
        rotation=inputs.rotation,
    )
