"""`recalibrate`: one run on transformers.Trainer, with weighted targets and whole checkpoints."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from drope_kernels.loss import causal_lm_loss, target_weights
from drope_kernels.nn import DecoderLM
from drope_kernels.recalibrate.callbacks import FiniteLoss, ProgressBar
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import Columns, collate

PARTIAL_PREFIX = ".partial-"  # a checkpoint being written; its last act is to lose this prefix


@dataclass(frozen=True)
class RecalibrationResult:
    """What a run did. `history` holds one dict per log or evaluation, with `step` and the values
    that transformers logs (`loss`, `learning_rate`, `grad_norm`, `eval_loss`)."""

    model: nn.Module
    steps: int
    tokens: int  # input tokens over all devices
    seconds: float  # training, evaluation and checkpoints; without set-up
    train_loss: float  # mean over the run, nats per weighted target
    history: list[dict[str, float]]


def recalibrate(
    model: nn.Module,
    data: Dataset[Columns],
    config: RecalibrationConfig,
    *,
    eval_data: Dataset[Columns] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    description: str | None = "recalibrate",
) -> RecalibrationResult:
    """Train `model` in place on next-token prediction and return it in eval mode.

    The same call pretrains, recalibrates after `drop_positions()`, and continues the control.
    The seed is set for Python, numpy and torch as a whole.

    Args:
        model: a `DecoderLM` or a transformers causal language model; moved to the GPU if there is
            one and `config.use_cpu` is off.
        data: map-style rows with `input_ids`, `labels`, optionally `loss_weights`, each
            (context_length,): see `TokenRows` and `packed_rows`. Order is drawn from the seed.
        config: optimiser, schedule, length of the run, intervals.
        eval_data: rows for `config.eval_steps`; `eval_loss` is the mean over rows of the weighted
            mean of each batch.
        callbacks: further transformers callbacks.
        description: label of the progress bar; None for no bar.

    Raises:
        ValueError: data too small, of another length or without the columns, eval_steps without
            eval_data, or loss_chunk with a model that is not a DecoderLM.
        TypeError: data that is a stream.
        FloatingPointError: the loss is no longer a number.

    An interrupt (KeyboardInterrupt) passes through; finished checkpoints in `config.output_dir`
    stay, an unfinished one is removed.
    """
    if config.loss_chunk is not None and not isinstance(model, DecoderLM):
        raise ValueError(
            f"loss_chunk: expected None for a {type(model).__name__}, got {config.loss_chunk}; "
            "only DecoderLM takes its loss in chunks"
        )
    _check_data(data, eval_data, config)
    bar = ProgressBar(description) if description is not None else None
    beside = [*callbacks, FiniteLoss(), *([bar] if bar is not None else [])]
    with contextlib.ExitStack() as cleanup:
        if config.output_dir is None:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="drope-run-")))
        else:
            folder = Path(config.output_dir)
        cleanup.callback(model.eval)
        if bar is not None:
            cleanup.callback(bar.close)
        trainer = WeightedTrainer(
            model=model,
            args=_training_arguments(config, folder),
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=collate,
            callbacks=beside,
            loss_chunk=config.loss_chunk,
        )
        start = time.perf_counter()
        output = trainer.train()
        seconds = time.perf_counter() - start
    return RecalibrationResult(
        model=model,
        steps=output.global_step,
        tokens=output.global_step * config.tokens_per_step * trainer.args.world_size,
        seconds=seconds,
        train_loss=output.training_loss,
        history=trainer.state.log_history,
    )


def _check_data(
    data: Dataset[Columns], eval_data: Dataset[Columns] | None, config: RecalibrationConfig
) -> None:
    if config.eval_steps is not None and eval_data is None:
        raise ValueError("eval_data: expected rows because config.eval_steps is set, got None")
    for name, rows, least in (("data", data, config.batch_size), ("eval_data", eval_data, 1)):
        if rows is None:
            continue
        if isinstance(rows, IterableDataset) or not isinstance(rows, Sized):
            raise TypeError(f"{name}: expected a map-style dataset, got {type(rows).__name__}")
        if len(rows) < least:
            raise ValueError(f"{name}: expected at least {least} rows (one batch), got {len(rows)}")
        columns = rows[0]
        if not {"input_ids", "labels"} <= set(columns):
            raise ValueError(
                f"{name}: expected the columns input_ids and labels, got {sorted(columns)}"
            )
    length = len(data[0]["input_ids"])
    if length != config.context_length:
        raise ValueError(
            f"data: expected rows of config.context_length={config.context_length} tokens, "
            f"got {length}"
        )


def _training_arguments(config: RecalibrationConfig, folder: Path) -> TrainingArguments:
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


class WeightedTrainer(Trainer):
    """transformers.Trainer with per-token loss weights and checkpoints that appear whole."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's weight

    def __init__(self, *, loss_chunk: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # the same, for releases before that attribute
        self.loss_chunk = loss_chunk
        self.checkpoint_parent: str | None = None
        self.remove_callback(PrinterCallback)
        if self.args.should_save:
            for leftover in Path(self.args.output_dir).glob(PARTIAL_PREFIX + "*"):
                shutil.rmtree(leftover)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Columns], num_batches: int, device: torch.device
    ) -> tuple[list[Columns], Tensor]:
        """The micro-batches of one step and the sum of their weights over all devices."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        total = torch.zeros((), device=device)
        for batch in batches:
            total += target_weights(batch["labels"], batch.get("loss_weights")).sum().to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, torch.where(total == 0, torch.ones_like(total), total)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Columns]:
        """Training drops a last short batch; in evaluation every row counts."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Sum of weighted losses over the step's total weight (in evaluation: the batch's)."""
        labels, weights = inputs["labels"], inputs.get("loss_weights")
        divisor = num_items_in_batch if model.training else None
        if isinstance(self.model, DecoderLM):
            outputs = model(
                inputs["input_ids"],
                labels,
                weights,
                num_items_in_batch=divisor,
                loss_chunk=self.loss_chunk,
            )
            loss = outputs.loss
        else:
            others = {k: v for k, v in inputs.items() if k not in ("labels", "loss_weights")}
            outputs = model(**others, use_cache=False)
            loss = causal_lm_loss(outputs.logits, labels, weights, divisor)
        if divisor is not None:
            loss = loss * self.args.world_size  # DDP averages what is already a global mean
        return (loss, outputs) if return_outputs else loss

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoint_parent or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a hidden folder first, so that `checkpoint-N` is whole whenever it exists."""
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        partial = run / (PARTIAL_PREFIX + name)
        self.checkpoint_parent = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _replace_folder(partial / name, run / name)
        finally:
            self.checkpoint_parent = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        if self.args.should_save:
            self._forget_old_checkpoints(run)

    def _forget_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None:
            return
        by_age = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
        for folder in by_age[:-limit]:
            hidden = folder.rename(run / (PARTIAL_PREFIX + folder.name))  # never seen half deleted
            shutil.rmtree(hidden)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if isinstance(self.model, DecoderLM):
            folder = Path(output_dir or self.args.output_dir)
            self.model.save(folder / "model.safetensors", state_dict)
        else:
            super()._save(output_dir, state_dict)


def _replace_folder(source: Path, target: Path) -> None:
    """Rename, displacing a folder of an earlier run."""
    if target.exists():
        displaced = source.with_name(source.name + "-displaced")
        target.rename(displaced)
    source.rename(target)
