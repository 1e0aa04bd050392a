"""The loss of a training step, taken inside the model's forward, so that its wrappers serve."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drope_kernels.hf.head import decoder_states, head_logits, is_split
from drope_kernels.nn import DecoderLM
from drope_kernels.nn.loss import causal_lm_loss, chunked_causal_lm_loss, distillation_loss

_DISTILLATION_CHUNK = 256  # positions, where loss_chunk does not say


@dataclass(frozen=True, eq=False)
class TeacherStates:
    """What the teacher says about a batch, up to its head."""

    hidden: Tensor  # (B, S, E of the teacher)
    head: Callable[[Tensor], Tensor]
    weight: float
    temperature: float


@dataclass(frozen=True, eq=False)
class Targets:
    """What a batch is to be judged by; no pytree, so that nobody casts it to 16 bits."""

    labels: Tensor  # (B, S) int64
    loss_weights: Tensor | None  # (B, S) float32
    divisor: Tensor | None  # () float32; None: the batch's own weight
    chunk: int | None
    teacher: TeacherStates | None = None


class Losses(NamedTuple):
    """Nats, () float32; what is trained on, and without gradient its two parts."""

    loss: Tensor
    ce: Tensor | None = None
    kl: Tensor | None = None


@contextlib.contextmanager
def losses_from_forward(model: Any, *, compiled: bool = False) -> Iterator[None]:
    """Inside, `model(targets=..., **inputs)` is its `Losses`; without targets all is as before."""
    stock = type(model).forward
    compute = torch.compile if compiled else _as_it_is
    take_losses = functools.partial(losses, compute(whole_loss), compute(hidden_states))

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, targets: Targets | None = None, **inputs: Any) -> Any:
        if targets is None:
            return stock(self, *args, **inputs)
        return take_losses(self, inputs, targets)

    _forget_preparation(model)
    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        _forget_preparation(model)


def _forget_preparation(model: nn.Module) -> None:
    """Else accelerate would neither autocast nor distribute a model that it has seen before."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def losses(
    whole: Callable[..., Tensor],
    read: Callable[..., Tensor],
    model: nn.Module,
    inputs: dict[str, Any],
    targets: Targets,
) -> Losses:
    """The losses of one batch, by chunks where targets ask for them or a teacher is there.

    `whole` is `whole_loss` and `read` is `hidden_states`, compiled or not; loops over chunks are
    not compiled, which would unroll them.
    """
    scored = targets.labels, targets.loss_weights, targets.divisor
    teacher = targets.teacher
    if teacher is None and targets.chunk is None:
        return Losses(whole(model, inputs, *scored))
    chunk = targets.chunk or _DISTILLATION_CHUNK
    hidden, head = read(model, inputs), functools.partial(logits_of, model)
    if teacher is None:
        return Losses(chunked_causal_lm_loss(head, hidden, *scored, chunk=chunk))
    ce, kl = distillation_loss(
        head,
        hidden,
        teacher.head,
        teacher.hidden,
        *scored,
        temperature=teacher.temperature,
        chunk=chunk,
    )
    w = teacher.weight
    return Losses((1 - w) * ce + w * teacher.temperature**2 * kl, ce.detach(), kl.detach())


def whole_loss(
    model: Any,
    inputs: dict[str, Any],
    labels: Tensor,
    loss_weights: Tensor | None,
    divisor: Tensor | None,
) -> Tensor:
    """`causal_lm_loss` of the model's own logits."""
    logits = type(model).forward(model, **_without_cache(model, inputs)).logits
    return causal_lm_loss(logits, labels, loss_weights, divisor)


def hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the head reads: (B, S, E)."""
    if isinstance(model, DecoderLM):
        states: Tensor = model.model(**inputs)
        return states
    return decoder_states(model, **inputs)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """What the model makes of hidden states (..., E): logits (..., V)."""
    if isinstance(model, DecoderLM):
        logits: Tensor = model.lm_head(hidden)
        return logits
    return head_logits(model, hidden)


def _without_cache(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs if isinstance(model, DecoderLM) else {**inputs, "use_cache": False}


def check_parts(model: Any, setting: str) -> None:
    """That the model's logits are `logits_of` its `hidden_states`, seen on a few tokens.

    Raises:
        ValueError: they are not, so that `setting` cannot be served.
    """
    if not isinstance(model, DecoderLM) and not is_split(model):
        raise ValueError(
            f"{setting}: expected a model whose logits are its output embeddings of the decoder's "
            f"states, got a {type(model).__name__}, which does more to them; leave {setting} out"
        )
