"""Calling a model under evaluation: any callable input_ids -> logits, in bounded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drope_kernels.nn.loss import token_losses

# input_ids (B, S) int64 -> logits (B, S, V), or an object that carries them as `.logits`.
LanguageModel = Callable[[Tensor], Any]

DEFAULT_BATCH_TOKENS = 8192
LOSS_CHUNK = 1024  # tokens, of all rows together, whose logits exist at one time


@dataclass(frozen=True)
class SplitModel:
    """A model given in two parts, so that (S, V) logits never exist at once.

    `hidden` maps input_ids (B, S) to states (B, S, d); `head` maps states (..., d) to logits
    (..., V). Use it where S * V does not fit in memory.
    """

    hidden: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))


@dataclass(frozen=True)
class DecodingModel(SplitModel):
    """A model that also continues its input.

    `greedy` maps input_ids (B, S) and a count to the most likely tokens (B, count) that follow,
    each given those before it.
    """

    greedy: Callable[[Tensor, int], Tensor]


def batches(input_ids: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Splits (N, S) into row batches of at most max_tokens tokens (always at least one row)."""
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids: expected (N, S), got {tuple(input_ids.shape)}; add a batch dim"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    rows = max(1, max_tokens // max(1, input_ids.shape[1]))
    yield from input_ids.split(rows)


def last_logits(model: LanguageModel, input_ids: Tensor, count: int) -> Tensor:
    """Logits (B, count, V) of the last `count` positions of input_ids (B, S)."""
    with torch.no_grad():
        if isinstance(model, SplitModel):
            return model.head(model.hidden(input_ids)[:, -count:])
        return _logits(model, input_ids)[:, -count:]


def greedy_tokens(model: LanguageModel, input_ids: Tensor, count: int) -> Tensor:
    """The `count` most likely tokens (B, count) after input_ids (B, S), one after the other."""
    if count < 1:
        raise ValueError(f"count: expected at least 1 token, got {count}")
    with torch.no_grad():
        if isinstance(model, DecodingModel):
            return model.greedy(input_ids, count)
        read = input_ids
        for _ in range(count):
            following = last_logits(model, read, 1).argmax(dim=-1)
            read = torch.cat([read, following.to(read.device)], dim=1)
    return read[:, -count:]


def next_token_losses(model: LanguageModel, input_ids: Tensor) -> Tensor:
    """Cross entropy (B, S - 1) float32, nats: entry i is the loss of token i + 1 given 0..i."""
    with torch.no_grad():
        if isinstance(model, SplitModel):
            states, head = model.hidden(input_ids), model.head
        else:
            states, head = _logits(model, input_ids), _identity
        losses = []
        num_rows, num_targets = input_ids.shape[0], input_ids.shape[1] - 1
        chunk = max(1, LOSS_CHUNK // num_rows)
        for start in range(0, num_targets, chunk):
            stop = min(start + chunk, num_targets)
            targets = input_ids[:, start + 1 : stop + 1].to(states.device)
            losses.append(token_losses(head(states[:, start:stop]), targets))
    return torch.cat(losses, dim=1)


def _logits(model: LanguageModel, input_ids: Tensor) -> Tensor:
    output = model(input_ids)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"model: expected logits ({input_ids.shape[0]}, {input_ids.shape[1]}, V), "
            f"got {tuple(logits.shape)}; return one row of logits per input token"
        )
    return logits


def _identity(logits: Tensor) -> Tensor:
    return logits
