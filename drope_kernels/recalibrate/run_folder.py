"""The folder of a run: what it holds already, and whether this run may go on in it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from drope_kernels.console.locks import INSIDE
from drope_kernels.console.paths import user_path
from drope_kernels.recalibrate.checkpoints import (
    PARTIAL_PREFIX,
    checkpoints_of,
    read_record,
    step_of,
)
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.environment import is_first_process, num_devices
from drope_kernels.recalibrate.identity import check_continues, settings_of
from drope_kernels.recalibrate.run_config import PATHS, RunConfig

SETTINGS, RESULT, MODEL, DATA = "settings.json", "result.json", "model", "data"

_PLACES = "places"  # in settings.json, of what may be spelled in many ways

Progress = Literal["new", "begun", "finished"]

_LENGTHS = ("batch_size", "gradient_accumulation", "steps", "tokens")
# They decide what is reported, kept or how fast, not what is trained.
_FREE = frozenset(
    {
        *("activation_checkpointing", "compile", "cpu", "loss_chunk", "sharded"),
        *(
            "output_dir",
            "data_cache",
            "log_steps",
            "eval_steps",
            "eval_rows",
            "save_steps",
            "keep_checkpoints",
        ),
        *("samples", "sample_steps", "sample_tokens"),
        *("length_sweep", "sweep_steps", "sweep_windows", "tensorboard", "resume", "export"),
        *_LENGTHS,  # checkpoints judge them
    }
)


def progress_of(config: RunConfig, recalibration: RecalibrationConfig) -> Progress:
    """Whether output_dir is free for this run, or holds it already. Nothing is changed.

    Raises:
        ValueError: another run, another length of it that cannot be reached from what is there, a
            damaged checkpoint, other files.
    """
    folder = Path(str(config.output_dir))
    if not is_first_process():  # the first one judges the folder, and is writing there already
        return _begun_or_finished(config, folder)
    if not folder.exists():
        _check_parent(folder)
        return "new"
    if not folder.is_dir():
        raise ValueError(f"output_dir: expected a folder, got the file {folder}")
    if not (folder / SETTINGS).is_file():
        if any(not file.name.startswith((PARTIAL_PREFIX, INSIDE)) for file in folder.iterdir()):
            raise ValueError(
                f"output_dir: expected a new or empty folder, or that of this run, got {folder} "
                "with other files; choose another"
            )
        return "new"
    if not (folder / RESULT).is_file() and not checkpoints_of(folder):
        return "new"  # it stopped before there was anything to go on from
    if not config.resume:
        raise ValueError(
            f"output_dir: expected a new or empty folder without resume, got {folder}, which holds "
            "a run; delete it, or give --resume true to go on with it"
        )
    _check_settings(config, folder)
    progress = _begun_or_finished(config, folder)
    if progress == "begun":
        _check_length(config, recalibration, folder)
    return progress


def settings_record(config: RunConfig) -> dict[str, Any]:
    """The content of settings.json: what was given, and where its paths lead."""
    return {**asdict(config), _PLACES: {name: _place(getattr(config, name)) for name in PATHS}}


def _check_settings(config: RunConfig, folder: Path) -> None:
    before, now = read_json(folder / SETTINGS), asdict(config)
    others = [
        f"{name} {before.get(name)} there, {now[name]} here"
        for name in now
        if name not in _FREE and not _same(name, before, now)
    ]
    if others:
        raise ValueError(
            f"output_dir: expected a new or empty folder, or that of this run, got {folder}, which "
            f"holds another: {'; '.join(others)}; choose another folder"
        )


def _same(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a setting means the same; paths from here, or from where the run began."""
    if name not in PATHS:
        return bool(before.get(name) == now[name])
    return _place(now[name]) in (_place(before.get(name)), before.get(_PLACES, {}).get(name))


def _place(value: Any) -> Any:
    """Of a path, of each of a list, or None."""
    if isinstance(value, list):
        return [_place(path) for path in value]
    return None if value is None else str(user_path(value).resolve())


def _check_parent(folder: Path) -> None:
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"output_dir: expected a place to write, got {folder}, and {existing} is no folder "
            "that can be written to"
        )


def _begun_or_finished(config: RunConfig, folder: Path) -> Progress:
    """A run is finished if its result is of this length: it may be asked to go on."""
    return "begun" if _other_lengths(config, folder) else "finished"


def _other_lengths(config: RunConfig, folder: Path) -> list[str]:
    """What of its length is not as in the result."""
    if not (folder / RESULT).is_file():
        return ["no result there"]
    before, now = read_json(folder / RESULT).get("settings", {}), asdict(config)
    return [
        f"{name} {before.get(name)} there, {now[name]} here"
        for name in _LENGTHS
        if before.get(name) != now[name]
    ]


def _check_length(config: RunConfig, recalibration: RecalibrationConfig, folder: Path) -> None:
    """That a checkpoint leads to the end that is asked for."""
    whole = checkpoints_of(folder)
    if not whole:
        raise ValueError(
            f"output_dir: expected the run that {folder} holds, which is finished and left no "
            f"checkpoint to go on from, got another length of it: "
            f"{'; '.join(_other_lengths(config, folder))}; choose another output_dir, where it "
            "begins anew"
        )
    recorded, own = read_record(whole[-1])["run"], settings_of(recalibration, num_devices())
    check_continues(own, recorded, whole[-1], step_of(whole[-1]))


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "choose another output_dir"
        if file.name == RESULT:
            remedy = f"delete it, and the run ends anew, or {remedy}"
        raise ValueError(
            f"{file}: expected what an earlier run wrote, got no JSON ({error}); {remedy}"
        ) from error


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = file.with_name(PARTIAL_PREFIX + file.name)
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
