"""What the entries of q and k of a case are, given normal ones: (q, k) to (q, k), in float64.

Where scores are large, products are whole numbers below 2^24: float32 then sums them exactly in
any order, so that scores that differ by little differ by the same on every backend and in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
LARGE = 100.0  # entries above it make a channel a large one: `large_channels`


def huge(q: Tensor, k: Tensor) -> Pair:
    """One outlier channel of +-400, as trained models have them: scores of about 14,000."""
    channel = q.shape[-1] // 2
    q[..., channel] = 400.0
    k[..., channel] = k[..., channel].sign() * 400.0
    return q, k


def pythagorean(q: Tensor, k: Tensor) -> Pair:
    """Half-split pairs (0, +-25 / 16) or (+-25 / 16, 0), for turns by the angles of 7, 24, 25.

    What they turn into are bf16 numbers, so that preparing q and k rounds nothing, and any other
    rounding on the way (cos and sin to bf16, q' twice) stands out. Ordinary numbers cover it: the
    one rounding that is allowed is as large.
    """

    def turned(x: Tensor) -> Tensor:
        first, second = x.sign().chunk(2, dim=-1)
        keep_first = x.chunk(2, dim=-1)[0].abs() > 0.7
        return torch.cat([first * keep_first, second * ~keep_first], dim=-1) * (25 / 16)

    return turned(q), turned(k)


def small_whole(x: Tensor) -> Tensor:
    return (1.5 * x).round().clamp(-3, 3)


def near_ties(q: Tensor, k: Tensor) -> Pair:
    """One channel that all share: scores of 2e6 (head_dim 32) that differ by a few."""
    q, k = small_whole(q), small_whole(k)
    q[..., 0], k[..., 0] = 3072.0, 4096.0
    return q, k


def near_ties_below(q: Tensor, k: Tensor) -> Pair:
    """The same of scores below zero."""
    q, k = near_ties(q, k)
    k[..., 0] *= -1
    return q, k


def released(q: Tensor, k: Tensor) -> Pair:
    """Most channels +-394, as in layer 1 of a released DroPE checkpoint: scores of 1.4e6."""
    q, k = small_whole(q), small_whole(k)
    signs = torch.tensor([394.0, -394.0], dtype=q.dtype).repeat(50)
    q[..., :100], k[..., :100] = signs, signs
    return q, k


def ties(q: Tensor, k: Tensor) -> Pair:
    """Equal scores of all keys: -2.4e9 times the scale."""
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 49152.0, -49152.0
    return q, k


def sentinels(q: Tensor, k: Tensor) -> Pair:
    """All scores as low as float32 goes, as where a caller hides keys with a finite number."""
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 2.0**64, -1.875 * 2.0**63
    return q, k


def thousands(factor: float) -> Callable[[Tensor, Tensor], Pair]:
    """One key takes all in nearly every row."""
    return lambda q, k: (factor * q, factor * k)


MAGNITUDES: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "normal": lambda q, k: (q, k),
    "huge": huge,
    "pythagorean": pythagorean,
    "near_ties": near_ties,
    "near_ties_below": near_ties_below,
    "released": released,
    "ties": ties,
    "sentinels": sentinels,
    "ten_thousands": thousands(1e4),
    "hundred_thousands": thousands(1e5),
}
BY_CHANNELS = ("near_ties", "near_ties_below", "released")


def large_channels(x: Tensor) -> Tensor:
    """(X,) bool: the channels of x (..., X) whose entries are large."""
    return x.abs().flatten(0, -2).amax(0) > LARGE
