"""Forward: rotates the keys once where the call rotates, then attends."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels.backends.triton.config import forward_config
from drope_kernels.backends.triton.forward import forward_kernel
from drope_kernels.backends.triton.launch import (
    architecture_of,
    dot_precision,
    num_blocks,
    on_device_of,
    padded,
)
from drope_kernels.backends.triton.params import (
    mask_params,
    rotary_params,
    rows_of,
    scale_params,
    shape_params,
)
from drope_kernels.backends.triton.prepare import prepare_kernel
from drope_kernels.layout import empty_in_order_of
from drope_kernels.spec import AttentionInputs


def forward(
    inputs: AttentionInputs, *, save_prepared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), rotated q and k (size 0 unless kept)."""
    q, k, v, rotation = inputs.q, inputs.k, inputs.v, inputs.rotation
    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    keep = save_prepared and rotation is not None
    q_prepared = q.new_empty(q.shape if keep else (0,))
    with on_device_of(q):
        k_prepared = k if rotation is None else prepare_keys(inputs)
        _attend(inputs, k_prepared, out, lse, q_prepared if keep else None)
    return out, lse, q_prepared, k_prepared if keep else q.new_empty(0)


def prepare_keys(inputs: AttentionInputs) -> Tensor:
    """The rotated keys, contiguous."""
    k, rotation = inputs.k, inputs.rotation
    assert rotation is not None
    k_prepared = k.new_empty(k.shape)
    shape = shape_params(inputs)
    block = 64
    num_tiles = num_blocks(shape.seqlen_kv, block, shape.num_seqs)
    num_programs = num_tiles * shape.batch * shape.num_heads_kv
    if k.numel():
        prepare_kernel[(num_programs,)](
            rows_of(k),
            rows_of(k_prepared),
            shape,
            mask_params(inputs),
            rotary_params(rotation),
            num_tiles,
            HEAD_DIM=k.shape[3],
            BLOCK_DIM=padded(k.shape[3]),
            ROTARY_DIM=rotation.dim,
            INTERLEAVED=rotation.interleaved,
            BLOCK_KV=block,
        )
    return k_prepared


def _attend(
    inputs: AttentionInputs, k: Tensor, out: Tensor, lse: Tensor, q_prepared: Tensor | None
) -> None:
    q, v, rotation = inputs.q, inputs.v, inputs.rotation
    shape = shape_params(inputs)
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    config = forward_config(architecture_of(q), q.dtype, max(head_dim, head_dim_v))
    num_tiles = num_blocks(shape.seqlen_q, config.BLOCK_Q, shape.num_seqs)
    num_programs = num_tiles * shape.batch * shape.num_heads_q
    if num_programs == 0 or q.shape[2] == 0:
        return
    forward_kernel[(num_programs,)](
        rows_of(q),
        rows_of(k),
        rows_of(v),
        rows_of(out),
        lse,
        None if q_prepared is None else rows_of(q_prepared),
        shape,
        mask_params(inputs),
        scale_params(inputs),
        rotary_params(rotation),
        num_tiles,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DIM=padded(head_dim),
        BLOCK_DIM_V=padded(head_dim_v),
        ROTARY_DIM=0 if rotation is None else rotation.dim,
        INTERLEAVED=rotation is not None and rotation.interleaved,
        HAS_SOFTCAP=inputs.softcap is not None,
        PRECISION=dot_precision(q.dtype),
        BLOCK_Q=config.BLOCK_Q,
        BLOCK_KV=config.BLOCK_KV,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
