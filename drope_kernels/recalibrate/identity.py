"""What makes a run the run it is: a checkpoint is continued by the same model, data, settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drope_kernels.nn import DecoderLM
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import PackedRows

# They decide about memory, speed and reports, not about the run; or are told apart as lengths.
_FREE_SETTINGS = frozenset(
    {
        "activation_checkpointing",
        "compile",
        "decay",
        "eval_steps",
        "keep_checkpoints",
        "log_steps",
        "loss_chunk",
        "output_dir",
        "resume",
        "save_steps",
        "steps",
        "tensorboard",
        "tokens",
        "use_cpu",
        "warmup",
    }
)
_FREE_MODEL_KEYS = frozenset(
    {"_name_or_path", "architectures", "backend", "transformers_version", "use_cache"}
)
_SAMPLED_ROWS = 8


@dataclass(frozen=True)
class RunIdentity:
    """A run as its checkpoints remember it."""

    settings: dict[str, Any]
    lengths: dict[str, int]  # of the schedule: steps, warmup_steps, decay_steps
    processes: int
    model: dict[str, Any]
    teacher: dict[str, Any] | None
    data: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        teacher: nn.Module | None,
        data: Any,
        config: RecalibrationConfig,
        processes: int,
    ) -> RunIdentity:
        return cls(
            **settings_of(config, processes),
            model=describe_model(model),
            teacher=None if teacher is None else describe_model(teacher),
            data=describe_data(data),
        )

    def as_json(self) -> dict[str, Any]:
        """Of JSON's types only."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def check(self, recorded: Any, checkpoint: Path, step: int) -> None:
        """That this run continues the recorded one, which stands at `step`.

        Raises:
            ValueError: another run, by all the names that differ.
        """
        check_continues(self.as_json(), recorded, checkpoint, step)


def settings_of(config: RecalibrationConfig, processes: int) -> dict[str, Any]:
    """What of a run's identity is known before its model and its data are read."""
    steps, settings = config.total_steps(processes), dataclasses.asdict(config)
    return {
        "settings": {name: settings[name] for name in sorted(set(settings) - _FREE_SETTINGS)},
        "lengths": {
            "steps": steps,
            "warmup_steps": config.warmup_steps(steps),
            "decay_steps": config.decay_steps(steps) if config.schedule == "wsd" else 0,
        },
        "processes": processes,
    }


def check_continues(own: Mapping[str, Any], recorded: Any, checkpoint: Path, step: int) -> None:
    """That a run, of which `own` says all or some, continues the one of a checkpoint.

    Raises:
        ValueError: another run, by all the names that differ.
    """
    own = _plain(own)
    if not isinstance(recorded, dict):
        raise ValueError(
            f"{checkpoint}: expected the checkpoint of a recalibration, got {recorded!r} for "
            "its run; resume with what wrote it, or choose another output_dir"
        )
    known = {name: recorded.get(name) for name in own}
    if _one_schedule(dict(recorded.get("lengths", {})), own, step):
        known["lengths"] = own["lengths"]
    found = [
        f"{name} was {before!r} and is {now!r}" for name, before, now in differences(known, own)
    ]
    if found:
        raise ValueError(
            f"{checkpoint}: expected the same run to go on, but {'; '.join(found)}; resume "
            "with what it began with, or choose another output_dir. Only a constant schedule, "
            "and wsd before its decay, can take another number of steps"
        )


def _one_schedule(lengths: dict[str, int], own: Mapping[str, Any], step: int) -> bool:
    """Whether up to `step` the schedule of `lengths` is that of the run."""
    wanted, schedule = own["lengths"], own["settings"]["schedule"]
    if lengths.get("warmup_steps") != wanted["warmup_steps"]:
        return False
    if wanted["steps"] < step:
        return False
    if schedule == "constant":
        return True
    stable = min(x["steps"] - x["decay_steps"] for x in (lengths, wanted))
    return bool(schedule == "wsd" and step <= stable)


def _plain(content: Any) -> Any:
    """Of JSON's types only."""
    return json.loads(json.dumps(content, default=str))


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, configuration and a digest of the parameters' names and shapes."""
    config: Any = model.config
    fields = dataclasses.asdict(config) if isinstance(model, DecoderLM) else config.to_dict()
    kept = {name: fields[name] for name in fields if name not in _FREE_MODEL_KEYS}
    if isinstance(model, DecoderLM):
        kept["rope"] = [str(layer.rope) for layer in model.attentions]
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()
    return {"class": type(model).__name__, "config": kept, "parameters": digest}


def describe_data(data: Any) -> dict[str, Any]:
    """Number of rows and a digest: of packed documents whole, of other rows a few."""
    if isinstance(data, PackedRows):
        return {"rows": len(data), "digest": data.folder.fingerprint(data.split)} | {
            "attend_across_documents": data.attend_across_documents
        }
    digest = hashlib.sha256()
    for index in sampled(len(data)):
        row = data[index]
        for name in sorted(row):
            values = torch.as_tensor(row[name]).contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.numpy().tobytes())
    return {"rows": len(data), "digest": digest.hexdigest()}


def sampled(rows: int) -> list[int]:
    """Indices of rows that stand for all: first, last and some between."""
    last = rows - 1
    return sorted({round(i * last / (_SAMPLED_ROWS - 1)) for i in range(_SAMPLED_ROWS)})


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names, joined by dots, of what differs between two JSON values, and both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield name, before, now
