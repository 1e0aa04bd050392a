"""Next-token loss with per-token weights: the one definition that training and evaluation use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100  # torch's and transformers' mark for "no target here"


def next_token_targets(labels: Tensor) -> Tensor:
    """(B, S) labels to (B, S) targets: entry t is the label of token t + 1, the last is -100."""
    return F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]  # pad first: S = 0 stays 0


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, float32: logits (B, S, V) and targets (B, S) to (B, S); 0 at -100."""
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return flat.view(targets.shape)


def target_weights(labels: Tensor, loss_weights: Tensor | None = None) -> Tensor:
    """What each next-token prediction counts: (B, S) labels and weights to (B, S) float32."""
    counted = (next_token_targets(labels) != IGNORED_LABEL).float()
    return counted if loss_weights is None else counted * F.pad(loss_weights, (0, 1))[:, 1:].float()


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """Weighted next-token cross entropy in nats: sum(weight * ce) / divisor.

    Args:
        logits: (B, S, V), any float dtype; the loss is taken in float32.
        labels: (B, S) int64, -100 where there is no target; the shift by one happens here.
        loss_weights: (B, S); entry t weighs the prediction *of* token t. Default 1.
        divisor: default the sum of the weights; a trainer passes the sum over all micro-batches
            of one step.
    """
    weights = target_weights(labels, loss_weights)
    losses = token_losses(logits, next_token_targets(labels))
    return (losses * weights).sum() / _divisor(weights, divisor)


def chunked_causal_lm_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
    *,
    chunk: int,
) -> Tensor:
    """`causal_lm_loss` of head(hidden), `chunk` positions at a time; hidden (B, S, E).

    Each chunk's logits are recomputed in backward, so (B, S, V) never exists.
    """
    if chunk < 1:
        raise ValueError(f"loss_chunk: expected a number of tokens >= 1, got {chunk}")
    weights = target_weights(labels, loss_weights)

    def chunk_losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_losses(head(hidden), targets)

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part in zip(
        hidden.split(chunk, dim=1),
        next_token_targets(labels).split(chunk, dim=1),
        weights.split(chunk, dim=1),
        strict=True,
    ):
        losses = checkpoint(chunk_losses, part[0], part[1], use_reentrant=False)
        total = total + (losses * part[2]).sum()
    return total / _divisor(weights, divisor)


def _divisor(weights: Tensor, divisor: Tensor | float | None) -> Tensor | float:
    if divisor is not None:
        return divisor
    total = weights.sum()
    return torch.where(total == 0, torch.ones_like(total), total)  # nothing to learn: loss 0
