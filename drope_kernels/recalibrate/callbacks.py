"""What happens beside the steps: TensorBoard, length sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drope_kernels.nn.loss import next_token_targets, token_losses


class TensorBoard(TrainerCallback):
    """Every logged number as a scalar, in event files; `writer` takes more.

    Args:
        folder: where the files go.
        after: the step where the run begins; what an earlier process wrote beyond it is hidden.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"tensorboard: expected the package to be installed, {error.name} is missing: "
                "pip install tensorboard, or leave this setting out"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=after + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, state.global_step)

    def close(self) -> None:
        self.writer.close()


class LengthSweep(TrainerCallback):
    """Held-out loss at several lengths while training goes on.

    Args:
        windows: per length L, token ids (N, L); compare lengths only if the texts are alike.
        every: optimiser steps between two sweeps; the last step is always swept.

    `rows` collects (step, {L: mean nats per predicted token}).
    """

    def __init__(self, windows: Mapping[int, Tensor], every: int) -> None:
        for length, ids in windows.items():
            if ids.ndim != 2 or ids.shape[1] != length:
                raise ValueError(f"windows[{length}]: expected (N, {length}), got {ids.shape}")
        if every < 1:
            raise ValueError(f"every: expected a number of steps >= 1, got {every}")
        self.windows, self.every = dict(windows), every
        self.rows: list[tuple[int, dict[int, float]]] = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        model.eval()  # the trainer sets train mode again before each step
        losses = {length: mean_loss(model, ids) for length, ids in self.windows.items()}
        self.rows.append((state.global_step, losses))


@torch.no_grad()
def mean_loss(model: nn.Module, input_ids: Tensor) -> float:
    """Mean next-token loss in nats over input_ids (N, L), one row at a time."""
    device = next(model.parameters()).device
    total = 0.0
    for row in input_ids.split(1):
        ids = row.to(device).long()
        total += float(token_losses(model(ids).logits, next_token_targets(ids)).sum())
    return total / (input_ids.shape[0] * (input_ids.shape[1] - 1))
