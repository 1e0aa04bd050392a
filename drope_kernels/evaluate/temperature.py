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
    """The multiplier beta of the default scale with the least loss in [low, high].

    `loss_at(beta)` is the held-out loss with scale beta / sqrt(head_dim); it should have one
    minimum there, and may be inf. The result is within `tolerance` of it, after about 6 calls for a
    smooth loss: the least point of a parabola through the three best ones, or a golden section step
    where that does not close in (Brent, Algorithms for Minimization without Derivatives, 1973, 5).
    """
    if not 0 < low < high or not tolerance > 0:
        raise ValueError(
            f"low, high, tolerance: expected 0 < low < high and tolerance > 0, "
            f"got {low}, {high}, {tolerance}"
        )
    first = high - GOLDEN * (high - low)
    best = second = third = loss_at(first), first
    step = before = 0.0  # the last one, and the one before it
    while max(best[1] - low, high - best[1]) > tolerance:
        beta = best[1]
        room = (high if beta < (low + high) / 2 else low) - beta
        shift = _parabola_step(best, second, third)
        if low < beta + shift < high and abs(shift) < abs(before) / 2:
            before, step = step, shift
            if min(beta + step - low, high - beta - step) < tolerance:
                step = math.copysign(tolerance / 2, room)
        else:
            before, step = room, (1 - GOLDEN) * room
        if abs(step) < tolerance / 2:
            step = math.copysign(tolerance / 2, step)
        tried = loss_at(beta + step), beta + step
        better, worse = sorted([best, tried])
        low, high = (low, worse[1]) if worse[1] > better[1] else (worse[1], high)
        if tried == better:
            best, second, third = tried, best, second
        elif tried <= second or second == best:
            second, third = tried, second
        elif tried <= third or third in (best, second):
            third = tried
    return best[1]


def _parabola_step(*points: tuple[float, float]) -> float:
    """From the first (loss, beta) of three to where their parabola is least; nan: nowhere."""
    (loss, beta), (loss_2, beta_2), (loss_3, beta_3) = points
    a, b = (beta - beta_2) * (loss - loss_3), (beta - beta_3) * (loss - loss_2)
    down = 2 * (a - b)
    return ((beta - beta_2) * a - (beta - beta_3) * b) / -down if down else math.nan


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
