"""Checks of tensor values, run inside the op where real data is: CPU tensors, or DROPE_CHECK=1."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from drope_kernels.call.validate import LARGEST_SCALE
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs
from drope_kernels.spec.values import readable

MAX_POSITION = 2**24  # integers up to here are exact in float32; turns are accurate up to here


def check_values(
    inputs: AttentionInputs, *, positions: Tensor | None, kv_positions: Tensor | None
) -> None:
    """ValueError for values no backend can serve. `positions` before conversion to float32."""
    seqlen_kv = inputs.k.shape[2]
    if isinstance(inputs.scale, Tensor) and readable(inputs.scale):
        check_scale_rows(inputs.scale)
    check_range("kv_start", inputs.kv_start, 0, seqlen_kv)
    check_range("kv_end", inputs.kv_end, 0, seqlen_kv)
    if inputs.cu_seqlens_q is not None:
        check_cu_seqlens("cu_seqlens_q", inputs.cu_seqlens_q, inputs.q.shape[2])
        check_cu_seqlens("cu_seqlens_k", inputs.cu_seqlens_k, seqlen_kv)
    if inputs.rotation is not None:
        if positions is None:
            _check_default_positions(inputs)
        check_positions("positions", positions)
        check_positions("kv_positions", kv_positions)
        if kv_positions is None and seqlen_kv - 1 > MAX_POSITION:
            raise ValueError(
                f"k: expected at most 2**24 + 1 rows with rope, got {seqlen_kv}; positions beyond "
                "2**24 are not exact in float32"
            )


def check_decode_values(inputs: DecodeInputs) -> None:
    """ValueError for values no backend can serve; nothing has been written yet."""
    if isinstance(inputs.scale, Tensor) and readable(inputs.scale):
        check_scale_rows(inputs.scale)
    check_range("kv_start", inputs.kv_start, 0, inputs.capacity)
    check_cache(inputs.cache_seqlens, inputs.num_new, inputs.k_cache, inputs.page_table)
    if inputs.rotation is not None and inputs.capacity - 1 > MAX_POSITION:
        raise ValueError(
            f"k_cache: expected at most 2**24 + 1 rows with rope, got {inputs.capacity}; positions "
            "beyond 2**24 are not exact in float32"
        )


def check_scale_rows(scale: Tensor) -> None:
    """> 0 and no larger than a number may be, everywhere; reads each stored element once."""
    stored = scale[tuple(slice(0, 1 if stride == 0 else None) for stride in scale.stride())]
    good = (stored > 0) & (stored <= LARGEST_SCALE)
    if not bool(good.all()):
        raise ValueError(
            f"scale: expected finite numbers > 0, at most {LARGEST_SCALE:.3g}, got "
            f"{stored[~good][0].item()}; it is the whole multiplier of q.k, D ** -0.5 by default"
        )


def check_range(name: str, x: Tensor | None, low: int, high: int) -> None:
    """low <= x <= high everywhere."""
    if x is None or not x.numel() or not readable(x):
        return
    smallest, largest = (int(m) for m in torch.aminmax(x))
    if smallest < low or largest > high:
        raise ValueError(
            f"{name}: expected values in [{low}, {high}], got values in [{smallest}, {largest}]; "
            "they count keys of the tensors given"
        )


def check_cu_seqlens(name: str, x: Tensor | None, total: int) -> None:
    """Starts at 0, never falls, ends at the number of packed rows."""
    if x is None or not readable(x):
        return
    ends = x.tolist()
    falls = any(begin > end for begin, end in pairwise(ends))
    if ends[0] != 0 or ends[-1] != total or falls:
        raise ValueError(
            f"{name}: expected 0, then non-decreasing ends up to the total of {total} rows, got "
            f"{ends if len(ends) <= 8 else f'{ends[:4]} ... {ends[-4:]}'}; build it with "
            "lengths.cumsum and a leading 0"
        )


def check_positions(name: str, x: Tensor | None) -> None:
    """Finite and within +-2**24, where float32 holds every integer."""
    if x is None or not x.numel() or not readable(x):
        return
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{name}: expected finite positions, got NaN or infinity; give "
            "padding any position, such as 0"
        )
    smallest, largest = (m.item() for m in torch.aminmax(x))
    if smallest < -MAX_POSITION or largest > MAX_POSITION:
        raise ValueError(
            f"{name}: expected positions in [-2**24, 2**24], got values in [{smallest}, "
            f"{largest}]; beyond that float32 cannot hold them. Subtract a common offset: rotation "
            "depends on differences only"
        )


def check_cache(
    cache_seqlens: Tensor, num_new: int, k_cache: Tensor, page_table: Tensor | None
) -> None:
    """Every row has room for the new keys, and its pages exist."""
    if not readable(cache_seqlens) or not cache_seqlens.numel():
        return
    num_pages, _, page_size, _ = k_cache.shape
    capacity = page_size * (1 if page_table is None else page_table.shape[1])
    smallest, largest = (int(m) for m in torch.aminmax(cache_seqlens))
    if smallest < 0 or largest + num_new > capacity:
        raise ValueError(
            f"cache_seqlens: expected values in [0, {capacity - num_new}] so that {num_new} new "
            f"keys fit into {capacity}, got values in [{smallest}, {largest}]; nothing was written"
        )
    if page_table is None:
        return
    in_use = (cache_seqlens + num_new + page_size - 1) // page_size  # (B,) pages
    used = torch.arange(page_table.shape[1], device=page_table.device) < in_use[:, None]
    check_range("page_table", page_table[used], 0, num_pages - 1)


def _check_default_positions(inputs: AttentionInputs) -> None:
    start, last = inputs.q_start, inputs.q.shape[2] - 1
    if isinstance(start, Tensor):
        if last >= 0:
            check_range("q_start", start, -MAX_POSITION, MAX_POSITION - last)
    elif last >= 0 and not -MAX_POSITION <= start <= MAX_POSITION - last:
        raise ValueError(
            f"q_start: expected positions in [-2**24, 2**24] with rope, got queries at {start} to "
            f"{start + last}; pass positions relative to a nearer origin"
        )
