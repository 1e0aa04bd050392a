"""`recalibrate`: one run on transformers.Trainer, from its checks to its result."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from drope_kernels.console.locks import alone_in
from drope_kernels.recalibrate.callbacks import TensorBoard
from drope_kernels.recalibrate.checkpoints import Start, find_start
from drope_kernels.recalibrate.checks import check_data, check_model, check_teacher
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import Columns, collate
from drope_kernels.recalibrate.distillation import Teacher
from drope_kernels.recalibrate.distributed import ShardedTrainer
from drope_kernels.recalibrate.environment import check_engines, num_devices, settings_rule
from drope_kernels.recalibrate.identity import RunIdentity
from drope_kernels.recalibrate.objective import check_parts, losses_from_forward
from drope_kernels.recalibrate.progress import TrainingProgress
from drope_kernels.recalibrate.trainer import WeightedTrainer, training_arguments


@dataclass(frozen=True)
class RecalibrationResult:
    """What a run did, all of it where it was resumed.

    `history` holds one dict per log or evaluation, with `step` and the values that were logged:
    `loss` (mean since the entry before, nats per weighted target; with a teacher also its parts
    `ce` and `kl`), `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`, or `eval_loss`.
    """

    model: nn.Module
    steps: int
    tokens: int  # input tokens that were read, over all devices
    seconds: float  # of this call: training, evaluation and checkpoints; without set-up
    train_loss: float  # mean over the run, nats per weighted target
    history: list[dict[str, float]]


def recalibrate(
    model: nn.Module,
    data: Dataset[Columns],
    config: RecalibrationConfig,
    *,
    eval_data: Dataset[Columns] | None = None,
    teacher: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    description: str | None = "recalibrate",
) -> RecalibrationResult:
    """Train `model` in place on next-token prediction and return it in eval mode.

    The same call pretrains, recalibrates after `drop_positions()`, and continues the control.
    What accelerate's variables in the environment say of precision or compilation does not count.
    The seed is set for Python, numpy and torch as a whole. With `config.resume` it goes on from
    the last checkpoint in `config.output_dir`, as if it had never stopped.

    Args:
        model: a `DecoderLM` or a transformers causal language model; moved to the GPU if there is
            one and `config.use_cpu` is off.
        data: map-style rows with `input_ids`, `labels`, optionally `loss_weights`, each
            (context_length,), and for transformers models further inputs such as `position_ids`:
            see `TokenRows`, `packed_rows`, `PackedRows`. A method `collate` makes its batches.
            Order is drawn from the seed.
        config: optimiser, schedule, length of the run, intervals.
        eval_data: rows for `config.eval_steps`; `eval_loss` is their weighted mean cross entropy.
        teacher: the model to learn from where `config.distillation` is not 0, as a rule a copy of
            `model` from before the drop; moved like it, not trained.
        callbacks: further transformers callbacks.
        description: label of the progress bar; None for no bar.

    Raises:
        ValueError: settings, data, model, teacher or checkpoint that do not fit together, before
            any step; a damaged checkpoint, by its file; an output_dir that another process holds.
        TypeError: data that is a stream.
        FloatingPointError: loss or gradient are no longer numbers; that step is not taken.
        OSError: a checkpoint that cannot be written.

    An interrupt (KeyboardInterrupt) passes through; finished checkpoints in `config.output_dir`
    stay, an unfinished one is removed.
    """
    check_data(data, eval_data, config, num_devices())
    check_model(model, data, eval_data, config)
    check_teacher(teacher, config)
    check_engines()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(model.eval)
        cleanup.enter_context(settings_rule())
        folder = _folder(config, cleanup)
        args = training_arguments(model, config, folder)
        if config.output_dir is not None and args.process_index == 0:
            cleanup.enter_context(alone_in(folder, argument="output_dir"))
        mentor = _mentor(model, teacher, config, args)
        identity, start = None, Start()
        if config.save_steps is not None or config.resume:
            identity = RunIdentity.of(model, teacher, data, config, args.world_size)
            start = find_start(folder, identity, resume=config.resume)
        beside = [*callbacks]
        if config.tensorboard and args.process_index == 0:
            beside.append(TensorBoard(folder / "runs", after=start.step))
            cleanup.callback(beside[-1].close)
        if description is not None:
            beside.append(TrainingProgress(description, lines=False))
            cleanup.callback(beside[-1].close)
        cleanup.enter_context(losses_from_forward(model, compiled=config.compile))
        if config.activation_checkpointing:
            cleanup.enter_context(activation_checkpointing(model))
        trainer_class = ShardedTrainer if config.sharded else WeightedTrainer
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=getattr(data, "collate", collate),
            callbacks=beside,
            loss_chunk=config.loss_chunk,
            teacher=mentor,
            identity=identity,
            unlogged=start.unlogged,
            tokens_per_step=config.tokens_per_step * args.world_size,
        )
        return _run(trainer, start, model)


def _folder(config: RecalibrationConfig, cleanup: contextlib.ExitStack) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    return Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="drope-run-")))


def _mentor(
    model: nn.Module,
    teacher: nn.Module | None,
    config: RecalibrationConfig,
    args: TrainingArguments,
) -> Teacher | None:
    if config.loss_chunk is not None:
        check_parts(model, "loss_chunk")
    if teacher is None:
        return None
    weight, temperature = config.distillation, config.distillation_temperature
    return Teacher(teacher.to(args.device), model, weight, temperature)


@contextlib.contextmanager
def activation_checkpointing(model: Any) -> Iterator[None]:
    """Inside, a transformers model recomputes its layers in backward."""
    # transformers 5.17 has only the older name of it, later ones warn of that
    verb = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if getattr(model, f"is_{verb}_checkpointing"):
        yield
        return
    settings = {f"{verb}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{verb}_checkpointing_enable")(**settings)
    try:
        yield
    finally:
        getattr(model, f"{verb}_checkpointing_disable")()
        model.disable_input_require_grads()


def _run(trainer: WeightedTrainer, start: Start, model: nn.Module) -> RecalibrationResult:
    """Train from `start` to the end, unless that is where it stands."""
    clock = time.perf_counter()
    if start.checkpoint is not None and start.step >= trainer.args.max_steps:
        trainer.restore(start.checkpoint)
    else:
        trainer.train(None if start.checkpoint is None else str(start.checkpoint))
    steps = trainer.state.global_step
    return RecalibrationResult(
        model=model,
        steps=steps,
        tokens=trainer.clock.tokens_in_all,
        seconds=time.perf_counter() - clock,
        train_loss=trainer.mean_loss(),
        history=trainer.state.log_history,
    )
