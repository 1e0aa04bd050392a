"""Held-out loss: by log-spaced position, and on the same last targets for every context length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from drope_kernels.evaluate.model_calls import (
    DEFAULT_BATCH_TOKENS,
    LanguageModel,
    batches,
    next_token_losses,
)


@dataclass(frozen=True)
class MeanLoss:
    """Mean cross entropy in nats per token over windows of text, which are the samples."""

    per_window: tuple[float, ...]
    num_targets: int  # of all windows together

    @property
    def mean(self) -> float:
        return fmean(self.per_window)

    @property
    def stderr(self) -> float:
        """Standard error of the mean; nan with a single window, or where a loss is not finite."""
        if len(self.per_window) == 1 or not all(map(math.isfinite, self.per_window)):
            return math.nan
        return stdev(self.per_window) / math.sqrt(len(self.per_window))

    def minus(self, other: MeanLoss) -> MeanLoss:
        """The difference window by window, for two losses on the same windows.

        Its standard error is far below that of either loss, because both met the same text.
        """
        if len(self.per_window) != len(other.per_window) or self.num_targets != other.num_targets:
            raise ValueError(
                f"other: expected a loss on the same {len(self.per_window)} windows and "
                f"{self.num_targets} targets, got {len(other.per_window)} and {other.num_targets}"
            )
        pairs = zip(self.per_window, other.per_window, strict=True)
        return MeanLoss(tuple(a - b for a, b in pairs), self.num_targets)


@dataclass(frozen=True)
class PositionBucket:
    """Targets at positions start..stop-1 (a token's position is the number of tokens before it)."""

    start: int
    stop: int
    loss: MeanLoss


def window_losses(
    model: LanguageModel, windows: Tensor, max_tokens: int = DEFAULT_BATCH_TOKENS
) -> Tensor:
    """(N, S) windows -> (N, S - 1) float32 losses in nats; column i is the target at position i+1.

    At most max_tokens tokens (but at least one window) go through the model in a call.
    """
    return torch.cat(
        [next_token_losses(model, batch).cpu() for batch in batches(windows, max_tokens)]
    )


def mean_loss(losses: Tensor) -> MeanLoss:
    """Of losses (N windows, targets)."""
    return MeanLoss(tuple(losses.double().mean(dim=1).tolist()), losses.numel())


def log_spaced_edges(length: int, first: int = 8, per_octave: int = 1) -> list[int]:
    """1, first, then rising by 2 ** (1 / per_octave) up to `length`, which is the last edge."""
    if not 1 < first < length:
        raise ValueError(f"first: expected between 1 and length={length}, got {first}")
    steps = math.ceil(per_octave * math.log2(length / first) - 1e-9)
    edges = [1] + [round(first * 2 ** (i / per_octave)) for i in range(steps)] + [length]
    return sorted(set(edges))


def loss_by_position(losses: Tensor, edges: Sequence[int] | None = None) -> list[PositionBucket]:
    """Buckets of losses (N, S - 1) as `window_losses` gives them; default edges are log-spaced."""
    length = losses.shape[1] + 1
    edges = log_spaced_edges(length) if edges is None else list(edges)
    if edges != sorted(set(edges)) or edges[0] < 1 or edges[-1] > length:
        raise ValueError(f"edges: expected rising positions in 1..{length}, got {edges}")
    return [
        PositionBucket(start, stop, mean_loss(losses[:, start - 1 : stop - 1]))
        for start, stop in itertools.pairwise(edges)
    ]


def last_target_losses(
    model: LanguageModel,
    windows: Tensor,
    length: int,
    num_targets: int,
    max_tokens: int = DEFAULT_BATCH_TOKENS,
) -> MeanLoss:
    """Loss of the last num_targets tokens of each window (N, S), read with `length` tokens.

    The targets are the same for every length, so a difference is what context changed.
    """
    if not 0 < num_targets < length <= windows.shape[1]:
        raise ValueError(
            f"length: expected num_targets={num_targets} < length <= {windows.shape[1]}, "
            f"got {length}"
        )
    losses = window_losses(model, windows[:, -length:], max_tokens)
    return mean_loss(losses[:, -num_targets:])
