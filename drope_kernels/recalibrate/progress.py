"""Progress of a run: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from drope_kernels.recalibrate.callbacks import ProgressBar


class RunProgress(ProgressBar):
    """Steps, tokens a second, time left, losses; a line per log entry where there is no terminal.

    Of the first process only.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        self.began, self.first_step = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        told = _told(logs or {})
        if not told or not state.is_world_process_zero:
            return
        if self.bar is not None:
            if "eval_loss" in (logs or {}):
                self.bar.write(f"step {state.global_step}: {told}", file=sys.stderr)
            else:
                self.bar.set_postfix_str(told, refresh=False)
            return
        done = state.global_step - self.first_step
        elapsed = time.perf_counter() - self.began
        left = elapsed * (state.max_steps - state.global_step) / max(done, 1)
        print(
            f"{self.description}: step {state.global_step}/{state.max_steps}, {told}, "
            f"{_clock(elapsed)} elapsed, {_clock(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _told(logs: dict[str, float]) -> str:
    """The numbers worth a line; empty where a log entry has none of them."""
    if "eval_loss" in logs:
        return f"validation loss {logs['eval_loss']:.4f}"
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4f}"]
    parts += [f"{name} {logs[name]:.4f}" for name in ("ce", "kl") if name in logs]
    parts += [f"lr {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
    speed = logs.get("tokens_per_second")
    return ", ".join(parts + ([f"{speed:,.0f} tokens/s"] if speed is not None else []))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
