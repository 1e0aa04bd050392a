"""How a run goes: optimiser, schedule, length, intervals; checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from drope_kernels.console.paths import user_path

Schedule = Literal["cosine", "wsd", "linear", "constant"]
SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclass(frozen=True)
class RecalibrationConfig:
    """Settings of one training run: pretraining, recalibration after the drop, or a control.

    The optimiser defaults are the DroPE paper's (arXiv 2512.12167, Table 4): AdamW with betas
    (0.9, 0.95) and weight decay 0.1, cosine schedule. Its learning rates are 1e-3 (494M from
    scratch, and SmolLM-360M with QK-norm) and 3e-4 without QK-norm (appendix D.3).

    Give the length as `steps` (optimiser steps) or as `tokens`, not both.
    """

    batch_size: int  # sequences per device and micro-batch
    context_length: int  # tokens per sequence; converts `tokens` into steps
    steps: int | None = None
    tokens: int | None = None
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup: int | float = 0.02  # an int: steps; a float below 1: share of all steps
    decay: float = 0.2  # wsd only: share of all steps spent decaying at the end
    min_lr_ratio: float = 0.0  # cosine and wsd: final learning rate / peak
    gradient_accumulation: int = 1
    weight_decay: float = 0.1  # matrices only: norms, biases and smear weights are not decayed
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    bf16: bool = False  # autocast; weights and optimiser state stay as they are
    distillation: float = 0.0  # weight w: loss = (1 - w) * cross entropy + w * KL(teacher, model)
    distillation_temperature: float = 1.0  # T: logits / T in the KL term, which counts T^2-fold
    loss_chunk: int | None = None  # positions per chunk of the loss, bounds memory
    activation_checkpointing: bool = False  # recompute layers in backward; transformers models
    compile: bool = False  # torch.compile of the training step's forward
    sharded: bool = False  # FSDP2: parameters and optimiser state are spread over the processes
    seed: int = 0
    use_cpu: bool = False  # stay on the CPU where there is a GPU
    log_steps: int = 50
    eval_steps: int | None = None  # None: no evaluation during the run
    save_steps: int | None = None  # None: no checkpoints
    keep_checkpoints: int | None = 2  # None: all
    output_dir: str | None = None  # needed with save_steps, resume and tensorboard
    resume: bool = False  # from the last checkpoint in output_dir; from the start if there is none
    tensorboard: bool = False  # event files in output_dir/runs

    def __post_init__(self) -> None:
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", str(user_path(self.output_dir)))
        self._check_counts()
        self._check_ranges()
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps, tokens: expected exactly one, got steps={self.steps}, tokens={self.tokens}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        for name in ("save_steps", "resume", "tensorboard"):
            if getattr(self, name) and self.output_dir is None:
                raise ValueError(
                    f"output_dir: expected a directory because {name} is set, got None"
                )

    def _check_counts(self) -> None:
        required = ("batch_size", "context_length", "gradient_accumulation", "log_steps")
        optional = (
            "steps",
            "tokens",
            "loss_chunk",
            "eval_steps",
            "save_steps",
            "keep_checkpoints",
        )
        for name in required + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: expected an int >= 0, got {self.seed!r}")

    def _check_ranges(self) -> None:
        beta1, beta2 = self.adam_betas
        one = 1.0 - 1e-12  # betas live in [0, 1)
        for name, value, low, high in (
            ("learning_rate", self.learning_rate, 1e-12, math.inf),
            ("decay", self.decay, 0.0, 1.0),
            ("min_lr_ratio", self.min_lr_ratio, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
            ("adam_betas[0]", beta1, 0.0, one),
            ("adam_betas[1]", beta2, 0.0, one),
            ("adam_eps", self.adam_eps, 0.0, math.inf),
            ("max_grad_norm", self.max_grad_norm, 0.0, math.inf),
            ("distillation", self.distillation, 0.0, 1.0),
            ("distillation_temperature", self.distillation_temperature, 1e-3, math.inf),
            ("warmup", self.warmup, 0, one if isinstance(self.warmup, float) else math.inf),
        ):
            if not low <= value <= high:  # also false for NaN
                raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value}")
            if value == math.inf:
                raise ValueError(f"{name}: expected a finite number, got {value}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step on one device."""
        return self.batch_size * self.context_length * self.gradient_accumulation

    def total_steps(self, devices: int = 1) -> int:
        """Optimiser steps of the run; a token budget is rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None  # __post_init__ made sure
        return math.ceil(self.tokens / (self.tokens_per_step * devices))

    def tokens_read(self, steps: int, rows: int, devices: int = 1) -> int:
        """Input tokens of so many steps over `rows`: the last step of a pass takes what is left."""
        batches = rows // self.batch_size // devices  # of a pass, on each device
        steps_per_pass = math.ceil(batches / self.gradient_accumulation)
        passes, rest = divmod(steps, max(steps_per_pass, 1))
        read = passes * batches + rest * self.gradient_accumulation
        return read * self.batch_size * self.context_length * devices

    def warmup_steps(self, total_steps: int) -> int:
        if isinstance(self.warmup, int):
            return min(self.warmup, total_steps)
        return round(self.warmup * total_steps)

    def decay_steps(self, total_steps: int) -> int:
        """Steps of wsd's decay at the end; they never reach into the warm-up."""
        after_warmup = total_steps - self.warmup_steps(total_steps)
        return min(round(self.decay * total_steps), after_warmup)

    def scheduler(self, total_steps: int) -> tuple[str, dict[str, Any]]:
        """transformers' name for the schedule and its arguments."""
        if self.schedule == "cosine":
            return "cosine_with_min_lr", {"min_lr_rate": self.min_lr_ratio}
        if self.schedule == "wsd":
            return "warmup_stable_decay", {
                "num_decay_steps": self.decay_steps(total_steps),
                "min_lr_ratio": self.min_lr_ratio,
            }
        return {"linear": "linear", "constant": "constant_with_warmup"}[self.schedule], {}
