"""The teacher of a distillation: the frozen model with its positions, read beside the student."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from drope_kernels.recalibrate.objective import TeacherStates, check_parts, hidden_states, logits_of


class Teacher:
    """A frozen model and how much it counts.

    Args:
        model: with the student's vocabulary and none of its weights; set to eval mode.
        student: the model that is trained.
        weight: w in (0, 1] of (1 - w) * cross entropy + w * T^2 * KL(teacher || student).
        temperature: T.

    Raises:
        ValueError: a teacher that cannot teach this student, saying why.
    """

    def __init__(
        self, model: nn.Module, student: nn.Module, weight: float, temperature: float = 1.0
    ) -> None:
        shared = {p.data_ptr() for p in model.parameters()} & {
            p.data_ptr() for p in student.parameters()
        }
        if shared:
            raise ValueError(
                "teacher: expected a model with weights of its own, got one that shares them with "
                "the model; copy.deepcopy the model before drop_positions()"
            )
        own, other = vocabulary(student), vocabulary(model)
        if own != other:
            raise ValueError(
                f"teacher: expected the model's vocabulary of {own} tokens, got {other}; a teacher "
                "of another tokenizer says nothing about these tokens"
            )
        check_parts(model, "teacher")
        check_parts(student, "distillation")
        self.model, self.weight, self.temperature = model.eval(), weight, temperature

    @torch.no_grad()
    def states(self, inputs: dict[str, Any]) -> TeacherStates:
        """The teacher's reading of a batch: the same tokens, positions and sequence bounds."""
        hidden = hidden_states(self.model, inputs)
        return TeacherStates(
            hidden, functools.partial(logits_of, self.model), self.weight, self.temperature
        )


def vocabulary(model: Any) -> int:
    """Number of tokens that a model knows: rows of its embedding."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is None:
        embeddings = model.model.embed_tokens
    rows: int = embeddings.num_embeddings
    return rows
