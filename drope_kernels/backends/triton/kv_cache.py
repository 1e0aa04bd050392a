"""Where the keys of a row of the batch lie in a decode call: in its cache, or in dealt pages.

PAGE_SIZE 0 is a contiguous cache; a pool of pages has one PAGE_SIZE for its life.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from drope_kernels.backends.triton.params import Rows

# Pages that a search for lost ones looks at in one step.
_SEARCH_WIDTH = tl.constexpr(128)


class KvCache(NamedTuple):
    """The caches; with pages their first dimension counts pages and their rows are a page's."""

    k: Rows  # (batch, num_heads_kv, capacity, head_dim)
    v: Rows  # (batch, num_heads_kv, capacity, head_dim_v)
    page_table: torch.Tensor | None  # (batch, pages_per_row) int32; None: no pages
    stride_page_table_batch: int
    num_pages: int


class KeyPlaces(NamedTuple):
    """Of a block of keys; `page` is one number where all lie in one page."""

    page: tl.tensor  # index of the caches' first dimension
    slot: tl.tensor  # (BLOCK_KV,) row of the page
    is_there: tl.tensor  # (BLOCK_KV,) wanted, and in a page that exists: others are not touched


class HeldKeys(NamedTuple):
    """Of a row of the batch, after the append."""

    fits: tl.tensor  # otherwise the row holds none and has no results
    end: tl.tensor


@triton.jit
def held_keys(num_keys, batch, capacity):
    """num_keys (batch,) int32; a number outside 0 .. capacity says that the row does not fit."""
    held = tl.load(num_keys + batch)
    fits = (held >= 0) & (held <= capacity)
    return HeldKeys(fits, tl.where(fits, held, 0))


@triton.jit
def is_in_pool(cache, page):
    return (page >= 0) & (page < cache.num_pages)


@triton.jit
def page_entries(cache, batch):
    """Address of a row of the page table."""
    return cache.page_table + tl.cast(batch, tl.int64) * cache.stride_page_table_batch


@triton.jit
def places_of_keys(cache, batch, key, is_wanted, PAGE_SIZE: tl.constexpr):
    """Of any keys (BLOCK_KV,) below the capacity, where is_wanted."""
    if PAGE_SIZE == 0:
        places = KeyPlaces(batch, key, is_wanted)
    else:
        entry = page_entries(cache, batch) + key // PAGE_SIZE
        page = tl.load(entry, mask=is_wanted, other=0)
        places = KeyPlaces(page, key % PAGE_SIZE, is_wanted & is_in_pool(cache, page))
    return places


@triton.jit
def places_of_block(
    cache, batch, kv_block, key, is_wanted, PAGE_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr
):
    """Of the keys (BLOCK_KV,) of a block below the capacity: one page number where it can be."""
    if PAGE_SIZE == 0 or PAGE_SIZE % BLOCK_KV != 0:
        places = places_of_keys(cache, batch, key, is_wanted, PAGE_SIZE)
    else:
        blocks_per_page: tl.constexpr = PAGE_SIZE // BLOCK_KV
        page = tl.load(page_entries(cache, batch) + kv_block // blocks_per_page)
        row = tl.arange(0, BLOCK_KV)
        slot = kv_block % blocks_per_page * BLOCK_KV + row
        num_rows = tl.where(is_in_pool(cache, page), BLOCK_KV, 0)
        places = KeyPlaces(page, slot, is_wanted & (row < num_rows))
    return places


@triton.jit
def row_offsets(x, places):
    """Offsets (BLOCK_KV,) of the keys' rows of one head."""
    page, slot = tl.cast(places.page, tl.int64), tl.cast(places.slot, tl.int64)
    return page * x.stride_batch + slot * x.stride_row


@triton.jit
def head_address(x, kv_head):
    return x.ptr + tl.cast(kv_head, tl.int64) * x.stride_head


@triton.jit
def append_fits(cache, batch, num_cached, num_new, capacity, PAGE_SIZE: tl.constexpr):
    """Whether the row has room for num_new more keys, in pages that exist."""
    fits = (num_cached >= 0) & (num_cached <= capacity - num_new)
    if PAGE_SIZE > 0:
        first_page = tl.where(fits, num_cached // PAGE_SIZE, 0)
        end_page = tl.where(fits, (num_cached + num_new + PAGE_SIZE - 1) // PAGE_SIZE, 0)
        for first in range(first_page, end_page, _SEARCH_WIDTH):
            index = first + tl.arange(0, _SEARCH_WIDTH)
            page = tl.load(page_entries(cache, batch) + index, mask=index < end_page, other=0)
            is_lost = (index < end_page) & (is_in_pool(cache, page) == 0)
            fits = fits & (tl.max(is_lost.to(tl.int32), 0) == 0)
    return fits
