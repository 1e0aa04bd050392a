"""The softmax temperature that position-free models need beyond their training length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogScale:
    """Logit scale that grows with the logarithm of the length: (1 + c ln max(1, L / L_train)) / √D.

    Source: DroPE, arXiv 2512.12167, appendix C.2: one multiplier of all logits, fitted per target
    length as beta = 1 + c ln(L / L_train). The paper's fits are c = 0.412 (494M parameters trained
    from scratch) and c = 0.103 (SmolLM); other models need a fit of their own. Up to the training
    length the scale is 1 / √D.

    Args:
        c: slope of the temperature, finite and >= 0; 0 gives 1 / √D at every length.
        train_length: tokens, the context at which the model was last trained, >= 1.

    Raises:
        ValueError: c or train_length outside its range.
    """

    c: float
    train_length: int

    def __post_init__(self) -> None:
        if isinstance(self.c, bool) or not isinstance(self.c, (int, float)):
            raise TypeError(f"c: expected a number, got {type(self.c).__name__}; 0 turns it off")
        if not (math.isfinite(self.c) and self.c >= 0):
            raise ValueError(f"c: expected a finite number >= 0, got {self.c}; 0 turns it off")
        if self.train_length < 1:
            raise ValueError(
                f"train_length: expected a number of tokens >= 1, got {self.train_length}; it is "
                "the context of the last training"
            )

    def __call__(self, length: int, head_dim: int) -> float:
        """The scale for a whole sequence of `length` tokens, as `attention(scale=...)` takes it.

        torch.compile specialises on the result, so each length compiles anew; `rows` does not.
        """
        _check(head_dim)
        if length < 0:
            raise ValueError(
                f"length: expected a number of tokens >= 0, got {length}; count the keys, in tokens"
            )
        stretch = max(1.0, length / self.train_length)
        return (1.0 + self.c * math.log(stretch)) / math.sqrt(head_dim)

    def rows(self, index: Tensor, head_dim: int) -> Tensor:
        """The scale of each query by how many keys a causal query sees there (our own variant).

        Args:
            index: any shape, integer: key index of the query, so it sees index + 1 keys.
            head_dim: D.

        Returns:
            float32 of the shape of `index`; a (B, Sq) result enters `attention` as
            `scale=rows[:, None, :]`.
        """
        _check(head_dim)
        if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected an integer tensor, got {got}; pass key indices")
        stretch = ((index.double() + 1) / self.train_length).clamp_min(1.0)
        rows = (1.0 + self.c * torch.log(stretch)) / math.sqrt(head_dim)
        return rows.to(torch.float32)


def _check(head_dim: int) -> None:
    if head_dim < 1:
        raise ValueError(
            f"head_dim: expected a number of channels >= 1, got {head_dim}; it is D of each head"
        )
