"""Checkpoints that are whole whenever they can be seen, and know which run they belong to."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from drope_kernels.nn import DecoderLM
from drope_kernels.recalibrate.identity import RunIdentity

PREFIX = "checkpoint-"
PARTIAL_PREFIX = ".partial-"  # a checkpoint being written; its last act is to lose this prefix
# What torch, pickle, safetensors and json raise at content that is not theirs.
_UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    pickle.UnpicklingError,
)
RECORD = "run.json"  # in a checkpoint: whose it is, its files, what was not logged yet


def checkpoints_of(run: Path) -> list[Path]:
    """Whole checkpoints of a run's folder, by their steps."""
    return sorted((path for path in run.glob(PREFIX + "*") if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it, which its name ends with."""
    digits = checkpoint.name.removeprefix(PREFIX)
    if not digits.isdecimal():
        raise ValueError(
            f"{checkpoint}: expected a name like {PREFIX}500, got {checkpoint.name}; take this "
            "folder out of the run's"
        )
    return int(digits)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The record of a checkpoint, all of whose files are there in full length.

    Raises:
        ValueError: a damaged checkpoint, by the file, or one that `recalibrate` did not write.
    """
    file = checkpoint / RECORD
    if not file.exists():
        raise ValueError(f"{file}: not there; {_remedy(checkpoint)}")
    with naming_damage(checkpoint, RECORD):
        record: dict[str, Any] = json.loads(file.read_text())
        sizes = dict(record["files"])
    for name, size in sizes.items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).exists() else 0
        if found != size:
            raise ValueError(
                f"{checkpoint / name}: expected {size} bytes, got {found}; {_remedy(checkpoint)}"
            )
    return record


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or with the model as it is."""

    checkpoint: Path | None = None
    step: int = 0
    unlogged: dict[str, Any] = field(default_factory=dict)


def find_start(run: Path, identity: RunIdentity, *, resume: bool) -> Start:
    """The last checkpoint of a run's folder, seen to be whole and of this run.

    Raises:
        ValueError: it is neither; or there is one and the run is not to be resumed.
    """
    found = checkpoints_of(run)
    if not found:
        return Start()
    last = found[-1]
    if not resume:
        raise ValueError(
            f"output_dir: expected a folder without checkpoints, got {last}; set resume=True to go "
            "on from it, or choose another folder"
        )
    record = read_record(last)
    identity.check(record["run"], last, step_of(last))
    return Start(last, step_of(last), record["unlogged"])


@contextlib.contextmanager
def naming_damage(checkpoint: Path, name: str) -> Iterator[None]:
    """Says which file it was that could not be read, and what to do."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{checkpoint / name}: cannot be read; {_remedy(checkpoint)}") from error


def _remedy(checkpoint: Path) -> str:
    earlier = [x for x in checkpoints_of(checkpoint.parent) if step_of(x) < step_of(checkpoint)]
    rest = f"at {earlier[-1].name}" if earlier else "at the start"
    return f"this checkpoint is damaged: delete {checkpoint}, and the run resumes {rest}"


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Weights of a checkpoint into `model`, all of them; of tied ones, one is enough."""
    state: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with naming_damage(checkpoint, file.name):
            state |= load_file(file)
    own = model.state_dict()
    given = {own[name].data_ptr() for name in state if name in own}
    missing = {name for name, value in own.items() if value.data_ptr() not in given} - set(state)
    if missing or not set(state) <= set(own):
        odd = sorted(missing | (set(state) - set(own)))
        raise ValueError(
            f"{checkpoint}: expected the weights of this {type(model).__name__}, got others "
            f"({', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}); resume with the same model"
        )
    model.load_state_dict(state, strict=False)


class CheckpointedTrainer(Trainer):
    """transformers.Trainer whose checkpoints appear whole and are continued exactly."""

    def __init__(self, *, identity: RunIdentity | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.identity = identity
        self.checkpoint_parent: str | None = None
        if self.args.should_save:
            for leftover in Path(self.args.output_dir).glob(PARTIAL_PREFIX + PREFIX + "*"):
                shutil.rmtree(leftover)

    def unlogged(self) -> dict[str, Any]:
        """What the next log entry needs to know of steps before a checkpoint, in JSON's types."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Weights and history of the checkpoint that ended the run."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoint_parent or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write to a hidden folder first, so that `checkpoint-N` is whole whenever it exists."""
        run = Path(self.args.output_dir)
        name = f"{PREFIX}{self.state.global_step}"
        partial = run / (PARTIAL_PREFIX + name)
        self.checkpoint_parent = str(partial)
        unlogged = self.unlogged()
        try:
            with naming_what_is_not_written(run, name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._write_record(partial / name, unlogged)
                    (partial / name).rename(run / name)
        finally:
            self.checkpoint_parent = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        if self.args.should_save:
            self._forget_old_checkpoints(run)

    def _write_record(self, folder: Path, unlogged: dict[str, Any]) -> None:
        record = {
            "run": None if self.identity is None else self.identity.as_json(),
            "unlogged": unlogged,
            "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1))

    def _forget_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None:
            return
        for folder in checkpoints_of(run)[:-limit]:
            hidden = folder.rename(run / (PARTIAL_PREFIX + folder.name))  # never seen half deleted
            shutil.rmtree(hidden)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if isinstance(self.model, DecoderLM):
            folder = Path(output_dir or self.args.output_dir)
            self.model.save(folder / "model.safetensors", state_dict)
        else:
            with _without_bars():
                super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """By way of the CPU: transformers 5.17 asks for "cpu:0" in a group of CPUs and fails."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        with naming_damage(folder, OPTIMIZER_NAME):
            self.load_optimizer(folder / OPTIMIZER_NAME)
        with naming_damage(folder, SCHEDULER_NAME):
            schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(schedule)

    def load_optimizer(self, file: Path) -> None:
        """What a checkpoint says about the optimiser, into it."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with naming_damage(Path(checkpoint), "rng_state*.pth"):
                super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows one for every file it writes; a run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def naming_what_is_not_written(run: Path, name: str) -> Iterator[None]:
    """Says what it was that found no place on the disk, and what is kept.

    Raises:
        OSError: in the place of what each writer raises.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        whole = [folder.name for folder in checkpoints_of(run)]
        kept = f"{whole[-1]} is whole" if whole else "there is no checkpoint"
        there = next(folder for folder in (run, *run.parents) if folder.exists())
        free = f"{shutil.disk_usage(there).free / 2**30:.2f} GiB are free there"
        mend = f"{free}: make room" if _says_full(error) else f"mend that ({free})"
        raise OSError(
            f"{run / name}: could not be written ({error}); nothing of it is left, {kept}; "
            f"{mend}, then {'resume' if whole else 'begin again'}"
        ) from error


def _says_full(error: Exception) -> bool:
    """Of errors without a number, those of safetensors have it in their text."""
    full, told = (errno.ENOSPC, errno.EDQUOT), str(error)
    return getattr(error, "errno", None) in full or any(f"os error {n})" in told for n in full)
