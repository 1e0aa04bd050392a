"""Checks of `attention_decode`'s caches and of `merge_attention`'s parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drope_kernels.call.validate import (
    check_index,
    check_qkv,
    check_qkv_paged,
    check_tensor_device,
    shape_of,
)


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache: str,
) -> None:
    """Shapes, dtypes and devices; caches and new rows must fit q and each other."""
    if page_table is None:
        check_qkv(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    else:
        _check_pages(q, k_cache, v_cache, page_table)
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither, got one of them; the cache holds both")
    if k is not None and v is not None:
        check_qkv(q, k, v)
        for name, new, old in (("k", k, k_cache), ("v", v, v_cache)):
            if new.shape[1] != old.shape[1] or new.shape[3] != old.shape[3]:
                raise ValueError(
                    f"{name}: expected heads and channels of {name}_cache {shape_of(old)}, got "
                    f"{shape_of(new)}; new rows are laid out as (B, Hkv, Snew, channels)"
                )
            _check_own_memory(f"{name}_cache", old)
    check_index("cache_seqlens", cache_seqlens, q, q.shape[0], "an int32 tensor (B,)")
    if cache_seqlens is None:
        raise TypeError(
            "cache_seqlens: expected an int32 tensor (B,), got None; zeros for an empty cache"
        )
    if cache not in ("raw", "rotated"):
        raise ValueError(
            f'cache: expected "raw" (unrotated keys) or "rotated", got {cache!r}; say how the '
            "cache was filled"
        )
    _check_no_grad(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)


def _check_own_memory(name: str, cache: Tensor) -> None:
    """Rows on the same memory, of expanded tensors, cannot each hold what is appended to them."""
    if any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True)):
        raise ValueError(
            f"{name}: expected memory of its own for every row to append to, got strides "
            f"{tuple(cache.stride())} for shape {shape_of(cache)}; use {name}.contiguous()"
        )


def _check_pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor) -> None:
    """Paged caches hold pages where a contiguous one holds batch rows."""
    check_qkv_paged(q, k_cache, v_cache)
    if not isinstance(page_table, Tensor):
        raise TypeError(
            f"page_table: expected an int32 tensor (B, pages_per_row), got "
            f"{type(page_table).__name__}; use torch.tensor(..., dtype=torch.int32)"
        )
    if page_table.dtype != torch.int32:
        raise TypeError(
            f"page_table: expected int32, got {page_table.dtype}; use page_table.to(torch.int32)"
        )
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"page_table: expected shape (B = {q.shape[0]}, pages_per_row), got "
            f"{shape_of(page_table)}; one row of page numbers per batch row"
        )
    check_tensor_device("page_table", page_table, q)
    if page_table.shape[1] == 0 or k_cache.shape[2] == 0:
        raise ValueError(
            f"page_table: expected at least 1 page of at least 1 row, got {shape_of(page_table)} "
            f"and page_size {k_cache.shape[2]}; allocate pages first"
        )


def _check_no_grad(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise NotImplementedError(
                f"{name}: expected no gradient in attention_decode, got requires_grad=True; call "
                "it under torch.no_grad(), or use attention() for training"
            )


def _types(parts: object) -> str:
    """A tensor where a list should be, or what the list holds."""
    items = parts if isinstance(parts, list | tuple) else [parts]
    return ", ".join(sorted({type(x).__name__ for x in items}))


def check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """The arguments of `merge_attention`."""
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, list | tuple) or not all(isinstance(x, Tensor) for x in parts):
            raise TypeError(
                f"{name}: expected a sequence of tensors, one per part, got {_types(parts)}; pass "
                "list(...) of what attention(return_lse=True) gave"
            )
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"outs, lses: expected as many of each, at least 1, got {len(outs)} and {len(lses)}; "
            "each out has one lse"
        )
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            raise ValueError(
                f"outs[{n}]: expected {shape_of(outs[0])} {outs[0].dtype} like outs[0], got "
                f"{shape_of(out)} {out.dtype}; parts are results for the same queries"
            )
        if lse.shape != out.shape[:-1] or lse.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"lses[{n}]: expected shape {tuple(out.shape[:-1])} float32, got "
                f"{shape_of(lse)} {lse.dtype}; pass the lse of attention(return_lse=True)"
            )
