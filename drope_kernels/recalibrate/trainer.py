"""The trainer of `recalibrate`: weighted targets, a teacher if there is one, exact continuation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from drope_kernels.nn.loss import target_weights
from drope_kernels.recalibrate.checkpoints import CheckpointedTrainer, checkpoints_of
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import Columns, FilledRows
from drope_kernels.recalibrate.distillation import Teacher
from drope_kernels.recalibrate.objective import Targets

_PARTS = ("ce", "kl")  # of the loss, logged beside it where a model learns from a teacher


def training_arguments(
    model: nn.Module, config: RecalibrationConfig, folder: Path
) -> TrainingArguments:
    """A config in transformers' words."""
    on_cpu = config.use_cpu or not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_eps,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        use_cpu=on_cpu,
        seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # it would hide NaN, at one host sync a step
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep_checkpoints,
        disable_tqdm=True,  # our bar instead
        report_to="none",
        prediction_loss_only=True,
        remove_unused_columns=False,  # keeps loss_weights
        use_cache=getattr(model.config, "use_cache", False),  # the trainer writes it there
        dataloader_drop_last=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs: one process each (torchrun), never nn.DataParallel
    # the length of the run depends on the number of processes, which only the arguments know
    args.max_steps = config.total_steps(args.world_size)
    args.warmup_steps = config.warmup_steps(args.max_steps)
    args.lr_scheduler_type, args.lr_scheduler_kwargs = config.scheduler(args.max_steps)
    return args


class WeightedTrainer(CheckpointedTrainer):
    """transformers.Trainer with per-token loss weights and checkpoints that appear whole.

    Its model is inside `losses_from_forward`. A step whose loss or gradient is no number is not
    taken.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's weight

    def __init__(
        self,
        *,
        loss_chunk: int | None = None,
        teacher: Teacher | None = None,
        unlogged: dict[str, Any] | None = None,
        tokens_per_step: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # the same, for releases before that attribute
        self.loss_chunk, self.teacher = loss_chunk, teacher
        self.tokens_per_step = tokens_per_step  # over all devices, of a step that is not cut short
        self.parts = dict.fromkeys(_PARTS, torch.zeros((), device=self.args.device))
        self.earlier = unlogged or {}  # of the checkpoint where this run begins
        self.logged_step = 0
        self.judged: list[Tensor] = []  # of each evaluated batch: its loss and weight, (2,)
        self._tr_loss = torch.zeros((), device=self.args.device)  # train() makes it anew
        self.clock = StepClock()
        self.remove_callback(PrinterCallback)
        self.callback_handler.callbacks.insert(0, self.clock)  # it times steps, not callbacks
        self.add_callback(_Beginning(self))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Columns], num_batches: int, device: torch.device
    ) -> tuple[list[Columns], Tensor]:
        """The micro-batches of one step and the sum of their weights over all devices."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        # all devices take as many: the last step of a pass has fewer batches than the others
        self.clock.tokens_of_step = self.args.world_size * sum(
            batch["input_ids"].numel() for batch in batches
        )
        total = torch.zeros((), device=device)
        for batch in batches:
            total += target_weights(batch["labels"], batch.get("loss_weights")).sum().to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, torch.where(total == 0, torch.ones_like(total), total)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Columns]:
        """Training drops a last short batch; in evaluation every row counts, and counts once."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1:
            rows = FilledRows(rows, self.args.per_device_eval_batch_size * self.args.world_size)
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(rows)
        finally:
            self.args.dataloader_drop_last = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Its loss is the mean over targets, however they lie in batches."""
        self.judged = []
        output = super().evaluation_loop(*args, **kwargs)
        losses, weights = torch.stack(self.judged).double().unbind(1)
        total, weight = self.accelerator.reduce(torch.stack([losses @ weights, weights.sum()]))
        output.metrics["eval_loss"] = float(total / weight) if weight else 0.0
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Sum of weighted losses over the step's total weight (in evaluation: the batch's)."""
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels"), inputs.pop("loss_weights", None)
        divisor = num_items_in_batch if model.training else None
        states = None
        if self.teacher is not None and model.training:
            with torch.no_grad(), self.accelerator.autocast():
                states = self.teacher.states(inputs)
        targets = Targets(labels, weights, divisor, self.loss_chunk, states)
        losses = model(**inputs, targets=targets)
        loss = losses[0]
        if divisor is not None:
            loss = loss * self.args.world_size  # DDP averages what is already a global mean
        if states is not None:
            for name, part in zip(_PARTS, losses[1:], strict=True):
                self.parts[name] = self.parts[name] + part * self.args.world_size
        if not model.training:
            self.judged.append(torch.stack([loss.detach(), target_weights(labels, weights).sum()]))
        return (loss, losses) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last look before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss = float(self._tr_loss)
        whole = checkpoints_of(Path(self.args.output_dir))
        kept = f", {whole[-1]} is whole" if whole else ""
        # a checkpoint is continued with its own settings only
        place = ", in another output_dir" if whole else ""
        for name, value in (("loss", loss), ("gradient's norm", float(norm))):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the training {name} is {value} at step {self.state.global_step + 1}, which "
                    f"is not taken{kept}; lower learning_rate, lengthen warmup, or add QK-norm"
                    f"{place}"
                )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With tokens seen and tokens per second over all devices, and the parts of the loss."""
        if "loss" in logs:
            steps = self.state.global_step - self.logged_step
            for name in _PARTS if self.teacher is not None else ():
                gathered = self.accelerator.gather(self.parts[name]).mean()
                logs[name] = float(gathered) / steps
                self.parts[name] = torch.zeros_like(self.parts[name])
            logs["tokens"] = self.clock.tokens_in_all
            logs["tokens_per_second"] = self.clock.tokens / self.clock.seconds
            self.clock.reset()
            self.logged_step = self.state.global_step
        super().log(logs, start_time)

    def unlogged(self) -> dict[str, Any]:
        """Sums since the last log entry, of which the next one will be the mean."""
        sums = {"loss": self._tr_loss, **self.parts}
        means = {name: float(self.accelerator.gather(x).mean()) for name, x in sums.items()}
        return {"step": self.logged_step, "tokens": self.clock.tokens_in_all, **means}

    def begin(self) -> None:
        """After transformers has set its counters: what the checkpoint had not logged yet."""
        self.state.compute_steps(self.args, self.args.max_steps)  # intervals are not the run's
        self.logged_step = self._globalstep_last_logged = self.earlier.get("step", 0)
        # checkpoints from before tokens were counted: as if all steps had been whole
        whole_steps = self.state.global_step * self.tokens_per_step
        self.clock.tokens_in_all = self.earlier.get("tokens", whole_steps)
        self._tr_loss += self.earlier.get("loss", 0.0)
        for name in _PARTS:
            self.parts[name] = self.parts[name] + self.earlier.get(name, 0.0)

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        self.begin()

    def mean_loss(self) -> float:
        """Mean over all steps so far, of the log and of what it does not have yet."""
        total, step = float(self._tr_loss), 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - step)
                step = entry["step"]
        return total / max(self.state.global_step, 1)


class StepClock(TrainerCallback):
    """Tokens read, and time spent in steps; evaluations and checkpoints do not count."""

    def __init__(self) -> None:
        self.started = 0.0
        self.tokens_of_step = 0  # that runs
        self.tokens_in_all = 0  # of the run
        self.reset()

    def reset(self) -> None:
        """Since the last log entry."""
        self.tokens, self.seconds = 0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.tokens += self.tokens_of_step
        self.tokens_in_all += self.tokens_of_step
        self.seconds += time.perf_counter() - self.started


class _Beginning(TrainerCallback):
    """Calls the trainer's `begin`."""

    def __init__(self, trainer: WeightedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.begin()
