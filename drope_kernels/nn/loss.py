"""Next-token loss with per-token weights: the one definition that training and evaluation use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def chunk_losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_losses(head(hidden), targets)

    total, weights = _chunked_sums(chunk_losses, [hidden], labels, loss_weights, chunk)
    return total / _divisor(weights, divisor)


def distillation_losses(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy, and how far the student is from its teacher: both (B, S) float32, in nats.

    The second is KL(softmax(teacher / T) || softmax(student / T)) without the factor T^2 that
    keeps its gradient's size (Hinton, Vinyals, Dean, arXiv 1503.02531, section 2).

    Args:
        logits, teacher_logits: (B, S, V).
        targets: (B, S) int64; the cross entropy, taken at temperature 1, is 0 at -100.
        temperature: T.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return token_losses(logits, targets), kl


def distillation_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    divisor: Tensor | float | None = None,
    *,
    temperature: float = 1.0,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Weighted means of `distillation_losses`, `chunk` positions at a time: ce and kl, ().

    Weights, targets and divisor are those of `causal_lm_loss`: where nothing is to be predicted
    the teacher is not heard either. hidden (B, S, E) and teacher_hidden (B, S, E') go through
    their heads; no gradient reaches the teacher.
    """

    def chunk_losses(hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden)
        return torch.stack(distillation_losses(head(hidden), teacher_logits, targets, temperature))

    states = [hidden, teacher_hidden]
    sums, weights = _chunked_sums(chunk_losses, states, labels, loss_weights, chunk)
    ce, kl = sums / _divisor(weights, divisor)
    return ce, kl


def _chunked_sums(
    chunk_losses: Callable[..., Tensor],
    states: Sequence[Tensor],
    labels: Tensor,
    loss_weights: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of chunk_losses(*states, targets), each recomputed in backward; the weights.

    States are (B, S, E), losses (..., B, S): sums (...), float32.
    """
    if chunk < 1:
        raise ValueError(f"loss_chunk: expected a number of tokens >= 1, got {chunk}")
    weights = target_weights(labels, loss_weights)
    total = torch.zeros((), dtype=torch.float32, device=labels.device)
    columns = [*states, next_token_targets(labels), weights]
    for *part, part_weights in zip(*(x.split(chunk, dim=1) for x in columns), strict=True):
        losses = checkpoint(chunk_losses, *part, use_reentrant=False)
        total = total + (losses * part_weights).sum(dim=(-2, -1))
    return total, weights


def _divisor(weights: Tensor, divisor: Tensor | float | None) -> Tensor | float:
    if divisor is not None:
        return divisor
    total = weights.sum()
    return torch.where(total == 0, torch.ones_like(total), total)  # nothing to learn: loss 0
