"""Decode: appends to the caches, then attends to them; a few queries in parts that are merged.

Many queries (a long append) are an ordinary forward over the keys of the caches. Of a pool of pages
those are copied to rows first, and of a raw cache rotated once, which takes memory as large as the
caches of the call (one layer of a model); a pool that its page table over-commits would need more
and is read as it is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from drope_kernels.backends.triton.config import (
    LONG_APPEND,
    DecodeConfig,
    decode_config,
    num_decode_splits,
)
from drope_kernels.backends.triton.decode import decode_kernel
from drope_kernels.backends.triton.decode_append import append_kernel
from drope_kernels.backends.triton.decode_gather import gather_kernel
from drope_kernels.backends.triton.kv_cache import KvCache
from drope_kernels.backends.triton.launch import (
    dot_precision,
    on_device_of,
    padded,
    rotary_constants,
)
from drope_kernels.backends.triton.launch_forward import attend, prepare_keys
from drope_kernels.backends.triton.merge import merge_kernel
from drope_kernels.backends.triton.params import (
    mask_params,
    range_params,
    rotary_params,
    rows_of,
    scale_params,
    shape_params,
)
from drope_kernels.backends.triton.unspecialized import unspecialized
from drope_kernels.spec.layout import empty_in_order_of, empty_lse
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs

COPY_BLOCK = 32
MERGE_PARTS = 16
INTERPRETED_SMS = 4


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); the caches are written in place."""
    q = inputs.q
    out = empty_in_order_of(q, (*q.shape[:3], inputs.v_cache.shape[3]))
    lse = empty_lse(q)
    if q.shape[0]:
        with on_device_of(q):
            num_keys = _append(inputs)
            if lse.numel():
                if _is_forward(inputs):
                    _attend_as_forward(inputs, num_keys, out, lse)
                else:
                    _attend_in_parts(inputs, num_keys, out, lse)
    return out, lse


def _cache(inputs: DecodeInputs) -> KvCache:
    k, v = rows_of(inputs.k_cache), rows_of(inputs.v_cache)
    if inputs.page_table is None:
        return KvCache(k, v, None, 0, 0)
    table = inputs.page_table.contiguous()
    return KvCache(k, v, table, table.stride(0), inputs.k_cache.shape[0])


def _page_size(inputs: DecodeInputs) -> int:
    return 0 if inputs.page_table is None else inputs.k_cache.shape[2]


def _append(inputs: DecodeInputs) -> Tensor:
    """Keys (B,) that each row holds afterwards; -1 where the new ones do not fit."""
    k, v, rotation = inputs.k, inputs.v, inputs.rotation
    lengths = inputs.cache_seqlens.contiguous()
    if k is None or v is None or not inputs.num_new:
        return lengths
    num_keys = torch.empty_like(lengths)
    if not inputs.rotated_cache:
        rotation = None
    num_tiles = -(-inputs.num_new // COPY_BLOCK)
    batch, num_heads_kv = k.shape[:2]
    append_kernel[(num_tiles * num_heads_kv * batch,)](
        rows_of(k),
        rows_of(v),
        _cache(inputs),
        lengths,
        num_keys,
        rotary_params(rotation),
        inputs.capacity,
        num_heads_kv,
        inputs.num_new,
        num_tiles,
        HEAD_DIM=k.shape[3],
        HEAD_DIM_V=v.shape[3],
        BLOCK_DIM_V=padded(v.shape[3]),
        **rotary_constants(rotation, k.shape[3]),
        PAGE_SIZE=_page_size(inputs),
        BLOCK_KV=COPY_BLOCK,
    )
    return num_keys


def _attend_in_parts(inputs: DecodeInputs, num_keys: Tensor, out: Tensor, lse: Tensor) -> None:
    q, num_heads_kv = inputs.q, inputs.k_cache.shape[1]
    batch, num_heads_q, seqlen_q, head_dim = q.shape
    head_dim_v = out.shape[3]
    group_rows = num_heads_q // num_heads_kv * seqlen_q
    rotation = inputs.rotation
    rotates_keys = rotation is not None and not inputs.rotated_cache
    config = decode_config(
        q.dtype, padded(max(head_dim, head_dim_v)), group_rows, rotates_keys=rotates_keys
    )
    num_tiles = -(-group_rows // config.BLOCK_Q)
    num_splits = _num_splits(inputs, config, num_tiles * num_heads_kv * batch)
    part_out, part_state = out, None
    if num_splits > 1:
        part_out = out.new_empty((num_splits * batch, *out.shape[1:]), dtype=torch.float32)
        part_state = lse.new_empty((2, num_splits, *lse.shape))
    plain = _as_attention(inputs, inputs.k_cache, inputs.v_cache, q_start=0, kv_end=None)
    shape = shape_params(plain)._replace(seqlen_kv=inputs.capacity, batch=batch)
    decode_kernel[(num_tiles * num_splits * num_heads_kv * batch,)](
        rows_of(q),
        _cache(inputs),
        rows_of(part_out),
        lse,
        part_state,
        num_keys,
        unspecialized(shape),
        unspecialized(mask_params(plain)),
        range_params(plain),
        scale_params(plain),
        rotary_params(rotation),
        num_tiles,
        num_splits,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DIM_V=padded(head_dim_v),
        ROTATES_KEYS=rotates_keys,
        **rotary_constants(rotation, head_dim),
        PAGE_SIZE=_page_size(inputs),
        HAS_SOFTCAP=inputs.softcap is not None,
        PRECISION=dot_precision(q.dtype),
        BLOCK_Q=config.BLOCK_Q,
        BLOCK_KV=config.BLOCK_KV,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if part_state is not None:
        _merge(plain, part_out, part_state, out, lse)


def _merge(
    inputs: AttentionInputs, part_out: Tensor, part_state: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Parts of split n: rows n * B up to (n + 1) * B of the first dimension of part_out."""
    merge_kernel[(lse.numel(),)](
        part_out,
        part_state,
        rows_of(out),
        lse,
        scale_params(inputs),
        out.shape[1],
        out.shape[2],
        lse.numel(),
        part_state.shape[1],
        HEAD_DIM_V=out.shape[3],
        BLOCK_DIM_V=padded(out.shape[3]),
        HAS_SOFTCAP=inputs.softcap is not None,
        BLOCK_PARTS=MERGE_PARTS,
    )


def _num_splits(inputs: DecodeInputs, config: DecodeConfig, num_tiles: int) -> int:
    seen = inputs.capacity
    if inputs.window is not None:
        seen = min(seen, inputs.window + inputs.q.shape[2])
    num_slots = _num_sms(inputs.q.device) * config.programs_per_sm
    return num_decode_splits(num_tiles, -(-seen // config.BLOCK_KV), num_slots)


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_forward(inputs: DecodeInputs) -> bool:
    if inputs.q.shape[2] < LONG_APPEND:
        return False
    num_pages, _, page_size, _ = inputs.k_cache.shape
    return inputs.q.shape[0] * inputs.capacity <= num_pages * page_size


def _attend_as_forward(inputs: DecodeInputs, num_keys: Tensor, out: Tensor, lse: Tensor) -> None:
    k, v = inputs.k_cache, inputs.v_cache
    if inputs.page_table is not None:
        k, v = _gather(inputs, num_keys)
    call = _as_attention(inputs, k, v, q_start=num_keys - inputs.q.shape[2], kv_end=num_keys)
    if inputs.rotation is not None and not inputs.rotated_cache:
        k = prepare_keys(call)
    attend(call, k, out, lse, None, None)
    lost = ((num_keys < 0) | (num_keys > inputs.capacity)).view(-1, 1, 1)
    out.masked_fill_(lost.unsqueeze(-1), torch.nan)
    lse.masked_fill_(lost, torch.nan)


def _gather(inputs: DecodeInputs, num_keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values in use of a pool, as (B, Hkv, capacity, D) and (B, Hkv, capacity, Dv)."""
    batch, num_heads_kv = inputs.q.shape[0], inputs.k_cache.shape[1]
    head_dim, head_dim_v = inputs.k_cache.shape[3], inputs.v_cache.shape[3]
    k = inputs.k_cache.new_empty((batch, num_heads_kv, inputs.capacity, head_dim))
    v = inputs.v_cache.new_empty((batch, num_heads_kv, inputs.capacity, head_dim_v))
    num_tiles = -(-inputs.capacity // COPY_BLOCK)
    gather_kernel[(num_tiles * num_heads_kv * batch,)](
        _cache(inputs),
        rows_of(k),
        rows_of(v),
        num_keys,
        inputs.capacity,
        num_heads_kv,
        num_tiles,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DIM=padded(head_dim),
        BLOCK_DIM_V=padded(head_dim_v),
        PAGE_SIZE=_page_size(inputs),
        BLOCK_KV=COPY_BLOCK,
    )
    return k, v


def _as_attention(
    inputs: DecodeInputs, k: Tensor, v: Tensor, *, q_start: int | Tensor, kv_end: Tensor | None
) -> AttentionInputs:
    """What decode has in common with attention, over these keys."""
    return AttentionInputs(
        q=inputs.q,
        k=k,
        v=v,
        scale=inputs.scale,
        causal=True,
        window=inputs.window,
        softcap=inputs.softcap,
        q_start=q_start,
        kv_start=inputs.kv_start,
        kv_end=kv_end,
        rotation=inputs.rotation,
    )
