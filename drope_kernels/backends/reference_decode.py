"""Decode for backends whose kernels see plain keys: append to the caches, then attend to them."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels.backends.reference import compute_dtype, rotate
from drope_kernels.call.check_values import readable
from drope_kernels.spec.layout import empty_in_order_of
from drope_kernels.spec.packed import Forward
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs, Rotation


def append_and_attend(inputs: DecodeInputs, forward: Forward) -> tuple[Tensor, Tensor]:
    """out and lse; rows whose append does not fit are not written and come back as NaN."""
    q, k, rotation = inputs.q, inputs.k, inputs.rotation
    start = inputs.cache_seqlens + inputs.num_new - q.shape[2]  # (B,) key index of query 0
    if rotation is not None and inputs.rotated_cache:
        q = _rotated(q, start, rotation)
        k = None if k is None else _rotated(k, inputs.cache_seqlens, rotation)
        rotation = None
    fits = _append(inputs, k)
    k_rows, v_rows = _rows_in_use(inputs)
    out, lse, _, _ = forward(
        AttentionInputs(
            q=q,
            k=k_rows,
            v=v_rows,
            scale=inputs.scale,
            causal=True,
            window=inputs.window,
            softcap=inputs.softcap,
            q_start=start,
            kv_start=inputs.kv_start,
            kv_end=(inputs.cache_seqlens + inputs.num_new).clamp(0, k_rows.shape[2]),
            rotation=rotation,
        ),
        save_prepared=False,
    )
    if q.device.type == "cpu":  # an append beyond the capacity has been refused
        return out, lse
    lost = ~fits.view(-1, 1, 1)
    return out.masked_fill(lost.unsqueeze(-1), torch.nan), lse.masked_fill(lost, torch.nan)


def _rotated(x: Tensor, start: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, S, D) rotated at positions start + i, rounded once, in the memory order of x."""
    positions = start[:, None] + torch.arange(x.shape[2], device=x.device)
    rotated = rotate(x.to(compute_dtype(x.dtype)), positions, rotation)
    return empty_in_order_of(x, x.shape).copy_(rotated)


def _rows_in_use(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """k and v as (B, Hkv, rows, X), up to the longest row where the host may know it."""
    k_rows, v_rows, table = inputs.k_cache, inputs.v_cache, inputs.page_table
    longest = inputs.capacity
    if readable(inputs.cache_seqlens) and inputs.cache_seqlens.numel():
        longest = int(inputs.cache_seqlens.max()) + inputs.num_new
    if table is None:
        return k_rows[:, :, :longest], v_rows[:, :, :longest]
    table = table[:, : -(-longest // k_rows.shape[2])]
    return _gather(k_rows, table), _gather(v_rows, table)


def _gather(pages: Tensor, page_table: Tensor) -> Tensor:
    """(num_pages, H, page_size, D) as (B, H, pages_per_row * page_size, D)."""
    chosen = pages[page_table.clamp(0, max(pages.shape[0] - 1, 0)).long()]
    return chosen.transpose(1, 2).flatten(2, 3)


def _append(inputs: DecodeInputs, k: Tensor | None) -> Tensor:
    """Writes k and inputs.v behind each row's keys. (B,) bool: the rows that they fit into."""
    lengths, num_new, page_table = inputs.cache_seqlens, inputs.num_new, inputs.page_table
    fits = (lengths >= 0) & (lengths + num_new <= inputs.capacity)
    if k is None or inputs.v is None:
        return fits
    index = lengths[:, None].long() + torch.arange(num_new, device=k.device)  # (B, Snew)
    if page_table is None:
        page = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(index)
        slot = index
    else:
        page_size = inputs.k_cache.shape[2]
        block = (index // page_size).clamp(0, page_table.shape[1] - 1)
        page, slot = page_table.long().gather(1, block), index % page_size
        fits = fits & ((page >= 0) & (page < inputs.k_cache.shape[0])).all(1)
    page, slot = page[fits].flatten(), slot[fits].flatten()
    for cache, new in ((inputs.k_cache, k), (inputs.v_cache, inputs.v)):
        cache[page, :, slot] = new[fits].transpose(1, 2).flatten(0, 1)
    return fits
