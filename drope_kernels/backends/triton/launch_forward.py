"""Forward: rotates the keys once where the call rotates, then attends."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels.backends.lse_state import state_of
from drope_kernels.backends.triton.config import ForwardConfig, forward_config, prepare_config
from drope_kernels.backends.triton.forward import forward_kernel
from drope_kernels.backends.triton.launch import (
    architecture_of,
    dot_precision,
    num_blocks,
    on_device_of,
    padded,
    rotary_constants,
    short_rows,
    tma_of,
    with_tma,
)
from drope_kernels.backends.triton.params import (
    ShapeParams,
    every_key_is_seen,
    mask_params,
    range_params,
    rotary_params,
    rows_of,
    scale_params,
    shape_params,
)
from drope_kernels.backends.triton.prepare import prepare_kernel
from drope_kernels.backends.triton.schedule import TileSchedule, tile_schedule
from drope_kernels.backends.triton.unspecialized import unspecialized
from drope_kernels.spec.layout import empty_in_order_of
from drope_kernels.spec.packed import ForwardResults
from drope_kernels.spec.spec import AttentionInputs


def forward(inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), softmax_state, rotated q and k (size 0 unless kept)."""
    q, k, v, rotation = inputs.q, inputs.k, inputs.v, inputs.rotation
    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    keep = save_prepared and rotation is not None
    q_prepared = q.new_empty(q.shape if keep else (0,))
    with on_device_of(q):
        k_prepared = k if rotation is None else prepare_keys(inputs)
        if lse.numel():
            attend(inputs, k_prepared, out, lse, q_prepared if keep else None)
    softmax_state = state_of(lse, needed=save_prepared)
    return out, lse, softmax_state, q_prepared, k_prepared if keep else q.new_empty(0)


def prepare_keys(inputs: AttentionInputs) -> Tensor:
    """The rotated keys, contiguous."""
    k, rotation = short_rows(inputs.k), inputs.rotation
    assert rotation is not None
    k_prepared = k.new_empty(k.shape)
    shape = shape_params(inputs)
    config = prepare_config(k.shape[3])
    num_tiles = num_blocks(shape.seqlen_kv, config.BLOCK_KV, shape.num_seqs)
    if k.numel():
        prepare_kernel[(num_tiles * shape.batch * shape.num_heads_kv,)](
            rows_of(k),
            rows_of(k_prepared),
            unspecialized(shape),
            unspecialized(mask_params(inputs)),
            range_params(inputs),
            rotary_params(rotation),
            num_tiles,
            HEAD_DIM=k.shape[3],
            BLOCK_KV=config.BLOCK_KV,
            **rotary_constants(rotation, k.shape[3]),
            num_warps=config.num_warps,
        )
    return k_prepared


def attend(
    inputs: AttentionInputs, k: Tensor, out: Tensor, lse: Tensor, q_prepared: Tensor | None
) -> None:
    """Writes out, lse and q_prepared, None if nobody wants it; k is already rotated."""
    q, k, v = short_rows(inputs.q), short_rows(k), short_rows(inputs.v)
    rotation = inputs.rotation
    if rotation is not None and q_prepared is None:
        q_prepared = q.new_empty(q.shape)
    shape = shape_params(inputs)
    head_dim, head_dim_v = q.shape[3], v.shape[3]
    block_dim, block_dim_v = padded(head_dim), padded(head_dim_v)
    architecture = architecture_of(q)
    use_tma = with_tma(architecture, k, v)
    config = forward_config(architecture, q.dtype, max(head_dim, head_dim_v), use_tma=use_tma)
    schedule = _schedule(shape, config, k, v)
    forward_kernel[(schedule.num_tiles * shape.batch * shape.num_heads_q,)](
        rows_of(q),
        rows_of(k),
        rows_of(v),
        tma_of(k, config.BLOCK_KV, block_dim) if use_tma else None,
        tma_of(v, config.BLOCK_KV, block_dim_v) if use_tma else None,
        rows_of(out),
        lse,
        None if q_prepared is None else rows_of(q_prepared),
        unspecialized(shape),
        unspecialized(mask_params(inputs)),
        range_params(inputs),
        scale_params(inputs),
        rotary_params(rotation),
        unspecialized(schedule),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DIM=block_dim,
        BLOCK_DIM_V=block_dim_v,
        HAS_UNSEEN_KEYS=not every_key_is_seen(inputs),
        HAS_SOFTCAP=inputs.softcap is not None,
        PRECISION=dot_precision(q.dtype),
        BLOCK_Q=config.BLOCK_Q,
        BLOCK_KV=config.BLOCK_KV,
        BLOCK_ROTATED=config.BLOCK_ROTATED,
        **rotary_constants(rotation, head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _schedule(shape: ShapeParams, config: ForwardConfig, k: Tensor, v: Tensor) -> TileSchedule:
    kv_bytes = shape.seqlen_kv * (k.shape[3] + v.shape[3]) * k.element_size()
    return tile_schedule(
        num_blocks(shape.seqlen_q, config.BLOCK_Q, shape.num_seqs),
        shape.num_heads_q // shape.num_heads_kv,
        shape.batch * shape.num_heads_kv,
        kv_bytes,
    )
