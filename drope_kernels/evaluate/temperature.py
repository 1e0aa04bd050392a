"""The softmax temperature at lengths beyond training: fitted per length, then as 1 + c ln s."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(
    loss_at: Callable[[float], float],
    low: float = 0.8,
    high: float = 2.5,
    tolerance: float = 0.01,
) -> float:
    """The multiplier beta of the default scale with the least loss, by golden section search.

    `loss_at(beta)` is the held-out loss with scale beta / sqrt(head_dim); it is called about
    ln((high - low) / tolerance) / 0.48 + 2 times and should have one minimum in [low, high].
    """
    if not 0 < low < high or not tolerance > 0:
        raise ValueError(
            f"low, high, tolerance: expected 0 < low < high and tolerance > 0, "
            f"got {low}, {high}, {tolerance}"
        )
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    loss_left, loss_right = loss_at(left), loss_at(right)
    while high - low > tolerance:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - GOLDEN * (high - low)
            loss_left = loss_at(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + GOLDEN * (high - low)
            loss_right = loss_at(right)
    return (low + high) / 2


def fit_log_slope(betas: Mapping[int, float], train_length: int) -> float:
    """c of beta = 1 + c ln(length / train_length), least squares; lengths <= train_length unused.

    DroPE's form (arXiv 2512.12167, appendix C.2): one fitted number for all lengths.
    """
    points = [
        (math.log(length / train_length), beta)
        for length, beta in betas.items()
        if length > train_length
    ]
    if not points:
        raise ValueError(
            f"betas: expected at least one length above train_length={train_length}, "
            f"got {sorted(betas)}"
        )
    return sum(x * (beta - 1) for x, beta in points) / sum(x * x for x, _ in points)
