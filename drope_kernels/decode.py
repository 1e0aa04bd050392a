"""`attention_decode`: append new keys to a cache and attend to all of it, in one call."""

from __future__ import annotations

from typing import Literal, Never, TypedDict, Unpack, overload

import torch
from torch import Tensor

from drope_kernels import validate
from drope_kernels.attention import AttentionOptions, attention, check_call
from drope_kernels.backends.reference import compute_dtype, rotate
from drope_kernels.check_values import check_cache
from drope_kernels.ops import LIBRARY
from drope_kernels.rope import DEFAULT_ROPE, Rope
from drope_kernels.spec import Rotation
from drope_kernels.validate_decode import check_decode

LIBRARY.define(
    "cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? page_table) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class DecodeOptions(TypedDict, total=False):
    """The keyword arguments of `attention_decode`, apart from return_lse and cache_seqlens."""

    k: Tensor | None
    v: Tensor | None
    page_table: Tensor | None
    rope: Rope | bool
    cache: Literal["raw", "rotated"]
    scale: float | Tensor | None
    window: int | None
    softcap: float | None
    kv_start: Tensor | None
    backend: str


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    rope: Rope | bool = False,
    cache: Literal["raw", "rotated"] = "raw",
    scale: float | Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kv_start: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **refused: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k, v to the caches, then attend causally: the queries are the last Sq tokens.

    Row b then holds L = cache_seqlens[b] + Snew keys, and query i sits at key index L - Sq + i.
    cache_seqlens itself is not changed. There is no gradient. Arguments not named here are those
    of `attention`.

    Args:
        q: (B, Hq, Sq, D).
        k_cache: (B, Hkv, Smax, D), or with a page table (num_pages, Hkv, page_size, D). Written.
        v_cache: (B, Hkv, Smax, Dv), or (num_pages, Hkv, page_size, Dv). Written.
        k: (B, Hkv, Snew, D), unrotated keys to append; None: append nothing.
        v: (B, Hkv, Snew, Dv); given exactly when k is.
        cache_seqlens: (B,) int32, valid keys of each row before the append.
        page_table: (B, pages_per_row) int32; key j of row b lies in page page_table[b, j //
            page_size]. Entries beyond a row's keys are not read.
        rope: as in `attention`; token j of a row has position j.
        cache: "raw", the cache holds unrotated keys, which rotate when read: one cache serves
            rope=False and every scaling; "rotated", keys rotate when appended.
        scale: as in `attention`, over (B, Hq, Sq).
        kv_start: (B,) int32, first valid key of each row (left padding).

    Returns:
        out (B, Hq, Sq, Dv); with return_lse also lse (B, Hq, Sq).

    Raises:
        ValueError, TypeError: as in `attention`. An append that does not fit is refused before
            anything is written (CPU tensors; on devices the rows that do not fit are not written
            and their results are NaN).
        NotImplementedError: an input requires grad outside torch.no_grad().
    """
    if refused:
        validate.refuse("attention_decode", refused)
    check_decode(q, k_cache, v_cache, k, v, cache_seqlens, page_table, cache)
    length = cache_seqlens if k is None else cache_seqlens + k.shape[2]  # (B,) after the append
    validate.check_flag("return_lse", return_lse)
    options: AttentionOptions = {"rope": rope, "scale": scale, "window": window}
    options |= {"softcap": softcap, "kv_start": kv_start, "backend": backend}
    _check_before_writing(q, k_cache, v_cache, page_table, length, options)
    if rope is not False and cache == "rotated":
        rotation = _rotation(rope, k_cache, q)
        q = _rotated(q, length - q.shape[2], rotation)
        k = None if k is None else _rotated(k, cache_seqlens, rotation)
        options["rope"] = False
    torch.ops.drope.cache_append(k_cache, v_cache, k, v, cache_seqlens, page_table)
    if page_table is not None:
        k_cache, v_cache = _gather(k_cache, page_table), _gather(v_cache, page_table)
    out, lse = _attend(q, k_cache, v_cache, length, options)
    return (out, lse) if return_lse else out


def _check_before_writing(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    length: Tensor,
    options: AttentionOptions,
) -> None:
    """Raises what `_attend` would raise, while the caches are still untouched."""
    capacity = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    k, v = (_as_rows(cache, q.shape[0], capacity) for cache in (k_cache, v_cache))
    start = length - q.shape[2]
    check_call(
        q,
        k,
        v,
        causal=True,
        positions=None,
        kv_positions=None,
        q_start=start,
        kv_end=None,
        **options,
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attention to the first length[b] keys of row b; its queries are the last Sq tokens."""
    capacity = k.shape[2]
    where: AttentionOptions = {
        "q_start": length - q.shape[2],
        "kv_end": length.clamp(max=capacity),
    }
    out, lse = attention(q, k, v, return_lse=True, **(options | where))
    if q.device.type == "cpu":  # an append beyond the capacity has been refused
        return out, lse
    lost = (length > capacity).view(-1, 1, 1)
    return out.masked_fill(lost.unsqueeze(-1), torch.nan), lse.masked_fill(lost, torch.nan)


def _rotation(rope: Rope | bool, k_cache: Tensor, q: Tensor) -> Rotation:
    rope = DEFAULT_ROPE if rope is True else rope
    validate.check_rope(rope, k_cache.shape[1])
    assert isinstance(rope, Rope)
    turns = rope.turns(q.shape[-1], q.device)
    return Rotation(turns, rope.interleaved, rope.attention_factor, None, None)


def _rotated(x: Tensor, start: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, S, D) rotated at positions start + i, rounded once."""
    positions = start[:, None] + torch.arange(x.shape[2], device=x.device)
    return rotate(x.to(compute_dtype(x.dtype)), positions, rotation).to(x.dtype)


def _as_rows(cache: Tensor, batch: int, capacity: int) -> Tensor:
    """(B, Hkv, capacity, D) of the cache's dtype and device, for checks: one key, repeated."""
    return cache[:1, :, :1].expand(batch, -1, capacity, -1)


def _gather(pages: Tensor, page_table: Tensor) -> Tensor:
    """(num_pages, H, page_size, D) as (B, H, pages_per_row * page_size, D)."""
    chosen = pages[page_table.clamp(0, max(pages.shape[0] - 1, 0)).long()]
    return chosen.transpose(1, 2).flatten(2, 3)


def _cache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
) -> None:
    page_size = k_cache.shape[2]
    num_new = 0 if k is None else k.shape[2]
    check_cache(cache_seqlens, num_new, k_cache, page_table)
    if k is None or v is None:
        return
    index = cache_seqlens[:, None].long() + torch.arange(num_new, device=k.device)  # (B, Snew)
    if page_table is None:
        page = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(index)
        fits = (index >= 0) & (index < page_size)
        slot = index
    else:
        fits = (index >= 0) & (index < page_size * page_table.shape[1])
        block = (index // page_size).clamp(0, page_table.shape[1] - 1)
        page, slot = page_table.long().gather(1, block), index % page_size
        fits &= (page >= 0) & (page < k_cache.shape[0])
    page, slot = page[fits], slot[fits]
    k_cache[page, :, slot] = k.transpose(1, 2)[fits]
    v_cache[page, :, slot] = v.transpose(1, 2)[fits]


def _cache_append_fake(*_: Tensor | None) -> None:
    """Nothing new comes back: the caches are written in place."""


LIBRARY.impl("cache_append", _cache_append, "CompositeExplicitAutograd")
torch.library.register_fake("drope::cache_append", _cache_append_fake, lib=LIBRARY)
