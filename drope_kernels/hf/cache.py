"""Caches of transformers that hold keys as they are before rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from drope_kernels.hf.ranges import KeyRanges


class RawKeys:
    """Mixin of a cache that only models with fused rotation may write, inside their forward.

    Keys have no position of their own in it: a kernel rotates them by their index. Positions of a
    row may differ from indices by a number, `shift`, that stays the same (left padding).
    """

    writable = False
    shift: Tensor | None = None  # (B,), _UNKNOWN for rows that had only padding so far

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.writable:
            raise ValueError(
                "past_key_values: expected a cache of rotated keys, got one that a model with "
                "fused_rotation=True filled; start from an empty cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.shift is not None:
            self.shift = self.shift.repeat_interleave(repeats)

    def _take_rows(self, rows: Tensor) -> None:
        if self.shift is not None:
            self.shift = self.shift[rows.to(self.shift.device)]


class RawDynamicCache(RawKeys, DynamicCache):
    """A `DynamicCache` of unrotated keys."""


class RawStaticCache(RawKeys, StaticCache):
    """A `StaticCache` of unrotated keys."""


_RAW = {DynamicCache: RawDynamicCache, StaticCache: RawStaticCache}
_UNKNOWN = -(2**62)


def require_raw(cache: Any) -> None:
    """Makes an empty cache of transformers one of raw keys, in place.

    Raises:
        ValueError: it holds keys of another model.
        NotImplementedError: neither a dynamic nor a static cache.
    """
    if isinstance(cache, RawKeys):
        return
    if type(cache) not in _RAW:
        raise NotImplementedError(
            "past_key_values: expected a DynamicCache or a StaticCache with fused_rotation=True, "
            f"got {type(cache).__name__}; use one of these, or fused_rotation=False"
        )
    if int(cache.get_seq_length()):
        raise ValueError(
            "past_key_values: expected an empty cache or one of unrotated keys, got one that a "
            "model without fused_rotation=True filled; start from an empty cache"
        )
    cache.__class__ = _RAW[type(cache)]


def check_positions(
    cache: RawKeys, position_ids: Tensor | None, attention_mask: Any, shape: tuple[int, int]
) -> None:
    """Positions of the new tokens (B, S) go on where those of the cached keys ended, row by row.

    Raises:
        ValueError: they differ from key indices by more than a number per row.
    """
    batch, seqlen = shape
    past = cache.get_seq_length()  # type: ignore[attr-defined]
    if isinstance(attention_mask, dict):  # of each kind of layer; the valid tokens are the same
        attention_mask = next(iter(attention_mask.values()))
    if position_ids is None:
        shift = torch.zeros((batch, seqlen), dtype=torch.int64)
    else:
        index = past + torch.arange(seqlen, device=position_ids.device)
        shift = (position_ids - index).expand(batch, seqlen)
    valid = _valid(attention_mask, shift)
    highest = shift.masked_fill(~valid, _UNKNOWN).amax(1)
    lowest = shift.masked_fill(~valid, -_UNKNOWN).amin(1)
    earlier = highest if cache.shift is None else cache.shift.to(highest.device)
    known = (highest != _UNKNOWN) & (earlier != _UNKNOWN)
    if not bool(((lowest >= highest) & (~known | (earlier == highest))).all()):
        raise ValueError(
            "position_ids: expected consecutive positions that go on from those of the cached "
            "keys, got others; with fused_rotation=True a cached key's position is its index, up "
            "to a number per row: pass use_cache=False, or fused_rotation=False"
        )
    cache.shift = torch.where(highest == _UNKNOWN, earlier, highest)


def _valid(attention_mask: Any, tokens: Tensor) -> Tensor:
    """(B, S): which of the new tokens are no padding."""
    batch, seqlen = tokens.shape
    if isinstance(attention_mask, Tensor):
        return attention_mask[:, -seqlen:].bool().to(tokens.device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(attention_mask, KeyRanges):
        start = torch.as_tensor(attention_mask.q_start, device=tokens.device).expand(batch)
        index = start[:, None] + torch.arange(seqlen, device=tokens.device)
        if attention_mask.kv_start is not None:
            valid &= index >= attention_mask.kv_start[:, None]
        if attention_mask.kv_end is not None:
            valid &= index < attention_mask.kv_end[:, None]
    return valid
