"""Progress of a training: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drope_kernels.console.progress import Bar, Progress, clock


class TrainingProgress(TrainerCallback):
    """Steps, tokens a second, time left, losses; of the first process only.

    Args:
        description: what the bar is called.
        lines: a line per log entry where stderr is no terminal; False: silent there.
    """

    def __init__(self, description: str, *, lines: bool) -> None:
        self.description, self.lines = description, lines
        self.progress = Progress(Console(stderr=True))
        self.bar: Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and (self.lines or self.progress.has_bars):
            self.bar = self.progress.bar(self.description, state.max_steps, state.global_step)
            self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.add(state.global_step - self.bar.done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        told = _told(logs or {})
        if not told or self.bar is None:
            return
        if not self.progress.has_bars:
            self.progress.write(
                f"{self.description}: step {state.global_step}/{state.max_steps}, "
                f"{', '.join(told)}, "
                f"{clock(self.bar.elapsed())} elapsed, {clock(self.bar.left())} left"
            )
        elif "eval_loss" in (logs or {}):
            self.progress.write(f"step {state.global_step}: {', '.join(told)}")
        else:  # what a narrow terminal cuts off is the learning rate
            self.bar.note = ", ".join(sorted(told, key=lambda part: part.startswith("lr ")))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands, also after an interrupt."""
        self.progress.close()


def _told(logs: dict[str, float]) -> list[str]:
    """The numbers worth a line; empty where a log entry has none of them."""
    if "eval_loss" in logs:
        return [f"validation loss {logs['eval_loss']:.4f}"]
    if "loss" not in logs:
        return []
    parts = [f"loss {logs['loss']:.4f}"]
    parts += [f"{name} {logs[name]:.4f}" for name in ("ce", "kl") if name in logs]
    parts += [f"lr {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
    speed = logs.get("tokens_per_second")
    return parts + ([f"{speed:,.0f} tokens/s"] if speed is not None else [])
