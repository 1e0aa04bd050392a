"""The model that a run leaves: room for it before the first step, a place for it after the last."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from drope_kernels.recalibrate.checkpoints import (
    PARTIAL_PREFIX,
    checkpoints_of,
    naming_what_is_not_written,
    step_of,
)
from drope_kernels.recalibrate.packed_folder import written_whole
from drope_kernels.recalibrate.run_folder import MODEL, RESULT

_ROOM = PARTIAL_PREFIX + "room"
_BESIDE_WEIGHTS = 32 << 20  # bytes: tokenizer, configs, headers
_UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # a file system that cannot reserve


@contextlib.contextmanager
def reserved_room(folder: Path, model: nn.Module, *, checkpoints: bool) -> Iterator[None]:
    """Inside, the disk space of the model is taken, so that nobody else fills it meanwhile.

    Args:
        folder: of the run.
        model: that will be saved, with its optimiser where there are checkpoints.

    Raises:
        OSError: there is no room for the model, or for a checkpoint beside it.
    """
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    moments = 2 * sum(
        value.numel() * value.element_size() for value in model.parameters() if value.requires_grad
    )
    of_model, of_checkpoint = weights + _BESIDE_WEIGHTS, (weights + moments) * checkpoints
    room = folder / _ROOM
    room.unlink(missing_ok=True)  # of a killed process
    try:
        if free_bytes(folder) < of_model + of_checkpoint or not _reserved(room, of_model):
            raise OSError(
                f"output_dir: expected room in {folder} for {_gib(of_model + of_checkpoint)} (the "
                f"model {_gib(of_model)}, a checkpoint {_gib(of_checkpoint)}), got "
                f"{_gib(free_bytes(folder))} free; make room there, or choose another output_dir"
            )
        yield
    finally:
        room.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _reserved(room: Path, count: int) -> bool:
    """Takes so many bytes of the disk; False where a disk or a quota is full."""
    with room.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, count)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False
            if error.errno not in _UNKNOWN:  # then what was free has to do
                raise
    return True


def save_model(folder: Path, model: Any, tokenizer: Any, step: int) -> None:
    """Into the run's folder, in the place of an earlier one, of a shorter or a killed run.

    Where that fails and no checkpoint of this step has the weights, they are left in a folder of
    their own for temporary files.

    Raises:
        OSError: it could not be written there; where the weights are.
    """
    target = folder / MODEL
    try:
        with naming_what_is_not_written(folder, MODEL), written_whole(target) as partial:
            _write(partial, model, tokenizer)
            (folder / RESULT).unlink(missing_ok=True)  # it tells of the model that goes
            if target.exists():
                shutil.rmtree(target)
    except OSError as error:
        if any(step_of(checkpoint) == step for checkpoint in checkpoints_of(folder)):
            raise
        raise OSError(f"{error}. {_saved_elsewhere(model, tokenizer)}") from error


def _saved_elsewhere(model: Any, tokenizer: Any) -> str:
    """What to say of the weights that found no place in the run's folder."""
    spare = Path(tempfile.mkdtemp(prefix="drope-model-"))
    with contextlib.ExitStack() as unless_written:
        unless_written.callback(shutil.rmtree, spare, ignore_errors=True)
        try:
            _write(spare, model, tokenizer)
        except (OSError, RuntimeError, SafetensorError) as error:
            return f"Nor could the trained model be written to {spare.parent} ({error}): it is lost"
        unless_written.pop_all()
    return f"The trained model is in {spare}: move it to where it can stay, the run has no other"


def _write(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
