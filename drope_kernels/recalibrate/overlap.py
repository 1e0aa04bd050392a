"""How much of held-out text is in the training text too, where its loss says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

WINDOW = 32  # tokens; a power of two
MOST_WINDOWS = 1 << 16  # of the held-out text, spread evenly
WORTH_TELLING = 0.05  # below it what pages have in common, such as licences
_AT_ONCE = 1 << 20  # tokens
_FACTOR = 0x9E3779B97F4A7C15  # odd: no token is lost from a hash
_TABLE_BITS = 24

Tokens = np.ndarray[Any, Any]


def share_seen(held_out: Tokens, train: Tokens) -> float:
    """The share of windows of held_out (T,) that are somewhere in train (S,), token for token."""
    if min(len(held_out), len(train)) < WINDOW:
        return 0.0
    num_windows = min(MOST_WINDOWS, len(held_out) // WINDOW)
    stride = len(held_out) // num_windows
    windows = [held_out[i * stride : i * stride + WINDOW] for i in range(num_windows)]
    wanted, counts = np.unique(
        np.concatenate([_hashes(window) for window in windows]), return_counts=True
    )
    table = np.zeros(1 << _TABLE_BITS, bool)  # spares most of train the search
    table[_slots(wanted)] = True
    seen = np.zeros(len(wanted), bool)
    for begin in range(0, len(train) - WINDOW + 1, _AT_ONCE):
        hashes = _hashes(train[begin : begin + _AT_ONCE + WINDOW - 1])
        seen |= np.isin(wanted, hashes[table[_slots(hashes)]])
    return float(counts[seen].sum() / counts.sum())


def _hashes(tokens: Tokens) -> Tokens:
    """Of every window of tokens (T,): (T - WINDOW + 1,) uint64."""
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    length = 1
    while length < WINDOW:
        factor = np.uint64(pow(_FACTOR, length, 1 << 64))
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes ^ (hashes >> np.uint64(32))


def _slots(hashes: Tokens) -> Tokens:
    return (hashes * np.uint64(_FACTOR)) >> np.uint64(64 - _TABLE_BITS)
