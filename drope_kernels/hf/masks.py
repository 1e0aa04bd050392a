"""Our `AttentionMaskInterface` function: transformers' mask functions recognised as key ranges.

A mask function of transformers is a tree of closures over index tensors. Each of its kinds has one
code object, so a tree is read exactly, without evaluating it: no dense mask, no synchronisation.
Whatever is not one of the kinds below is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import masking_utils

from drope_kernels.hf.ranges import KeyRanges, Unpadded, cu_seqlens_of_segments, ranges_of_padding

MaskFunction = Callable[..., Any]

_NOTHING = torch.empty(0)
_AND = masking_utils.and_masks().__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(_NOTHING).__code__
# Later versions count indices under a packed mask from each sequence's start, which changes no
# difference of two indices in one sequence.
_REMAPPED = [
    getattr(masking_utils, name)(_NOTHING, _NOTHING).__code__
    for name in ["remap_positions_for_packed_sequence"]
    if hasattr(masking_utils, name)
]


@dataclass
class Pattern:
    """What a mask function lets a query see, padding apart."""

    causal: bool = False
    window: int | None = None  # keys, the query's own included; ahead as well unless causal
    only_behind: bool = False  # the window says nothing about keys ahead: it needs causal
    segments: Tensor | None = None  # (B, S): number of the sequence of each token in its row

    def narrow(self, window: int) -> None:
        self.window = window if self.window is None else min(window, self.window)


def recognise(mask_function: MaskFunction) -> Pattern:
    """The pattern of a mask function of transformers.

    Raises:
        NotImplementedError: naming a part that is not known.
    """
    pattern = Pattern()
    _read(mask_function, pattern)
    if pattern.only_behind and not pattern.causal:
        _refuse("sliding_window_overlay without causal_mask_function")
    return pattern


def _read(mask_function: MaskFunction, pattern: Pattern) -> None:
    """Adds to `pattern` what `mask_function` says."""
    code = getattr(mask_function, "__code__", None)
    if mask_function is masking_utils.causal_mask_function:
        pattern.causal = True
    elif code is _AND:
        for part in _captured(mask_function, "mask_functions"):
            _read(part, pattern)
    elif code in _REMAPPED:
        _read(_captured(mask_function, "mask_function"), pattern)
    elif code is _PACKED:
        pattern.segments = _captured(mask_function, "packed_sequence_mask")
    elif code is _WINDOW:
        pattern.narrow(_captured(mask_function, "sliding_window"))
        pattern.only_behind = True
    elif code is _TWO_SIDED_WINDOW:  # it does not count the query's own key
        pattern.narrow(_captured(mask_function, "sliding_window") + 1)
    elif mask_function is not masking_utils.bidirectional_mask_function:
        _refuse(getattr(mask_function, "__qualname__", repr(mask_function)))


def _captured(mask_function: Any, name: str) -> Any:
    """The variable `name` that a closure holds."""
    index = mask_function.__code__.co_freevars.index(name)
    return mask_function.__closure__[index].cell_contents


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(
        f"mask function {name.split('.<locals>.inner_mask')[0]}: expected causal or bidirectional "
        "attention with a sliding window, padding or packed sequences, got a pattern that is not "
        "one interval of keys per query; use the eager, sdpa or flex attention for it"
    )


def _recognise_while_compiling(
    mask_function: MaskFunction,
    attention_mask: Tensor | Unpadded | None,
    local_size: int | None,
    use_vmap: bool,
    config: Any,
    kwargs: dict[str, Any],
) -> Pattern:
    """The same where closures cannot be opened: from the arguments transformers sends along.

    use_vmap says that a caller's own mask function is part of it, local_size is a window or a
    chunk; packed rows are told apart before, by `Unpadded`.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if mask_function.__code__ is not _AND or use_vmap:
        _refuse(mask_function.__qualname__)
    if attention_mask is None:
        raise NotImplementedError(
            "position_ids: expected them without attention_mask only outside torch.compile, where "
            "packed rows can be read from them; leave them out, or for packed rows pass "
            "cu_seq_lens_q and cu_seq_lens_k as well"
        )
    if local_size is None or getattr(config, "attention_chunk_size", None) is not None:
        _refuse(mask_function.__qualname__)
    two_sided = "allow_is_bidirectional_skip" in kwargs
    return Pattern(causal=not two_sided, window=local_size + two_sided)


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | Unpadded | KeyRanges | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> KeyRanges:
    """The key ranges of one forward pass; transformers calls it once per kind of layer.

    Args:
        batch_size: B.
        q_length, kv_length: numbers of queries and keys the attention function will get.
        q_offset, kv_offset: index of the first of each in the whole sequence; a static cache's
            q_offset is a tensor of no dimension.
        mask_function: transformers' predicate over indices.
        attention_mask: None; bool (B, length), True for valid tokens; or ranges made beforehand.
        local_size, allow_is_causal_skip, use_vmap, config, device, kwargs: as `sdpa_mask` gets.

    Raises:
        NotImplementedError: a pattern that is not one interval of keys per query, by name.
        ValueError: an attention_mask with holes.
    """
    if isinstance(attention_mask, KeyRanges):  # `generate` makes them before a compiled forward
        return attention_mask
    if torch.compiler.is_compiling():
        pattern = _recognise_while_compiling(
            mask_function, attention_mask, local_size, use_vmap, config, kwargs
        )
    else:
        pattern = recognise(mask_function)
    q_start: int | Tensor = q_offset - kv_offset
    if isinstance(q_start, Tensor):
        q_start = q_start.to(device, torch.int32).expand(batch_size).contiguous()
    elif q_length == 1 and not allow_is_causal_skip:
        # A static cache is decoding: a number that grows would compile every step anew.
        q_start = torch.full((batch_size,), q_start, dtype=torch.int32, device=device)
    kv_start = kv_end = cu_seqlens = None
    if isinstance(attention_mask, Tensor):
        kv_start, kv_end = ranges_of_padding(attention_mask, kv_length, kv_offset)
    if pattern.segments is not None:
        if use_vmap or attention_mask is not None:  # transformers' own come without either
            _refuse("packed_sequence_mask_function of a caller")
        cu_seqlens = cu_seqlens_of_segments(pattern.segments.expand(batch_size, -1))
    return KeyRanges(
        q_length,
        kv_length,
        pattern.causal,
        pattern.window,
        q_start,
        kv_start,
        kv_end,
        cu_seqlens,
    )
