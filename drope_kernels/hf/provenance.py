"""`config.drope["export"]`: what an export changed, so that loading and restoring can undo it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

from drope_kernels.build import build_info

# Beside rope_parameters, because converters look for it there.
TOP_LEVEL = "original_max_position_embeddings"
SUMS = "drope_export.sha256"


def export_note(config: Any, temperature: float | list[float], rounding: float) -> dict[str, Any]:
    """What an export of a model with this config says of itself."""
    before = (getattr(config, "drope", None) or {}).get("export")
    plain = temperature == 1.0 and config.drope["qk_norm"] is None
    return {
        "source": public_name(str(config._name_or_path)),
        "model_type": config.model_type,
        "max_position_embeddings": config.max_position_embeddings,
        "temperature": temperature,
        "rounding": rounding,
        "restorable": plain and (before is None or before["restorable"]),
        "versions": {
            "drope_kernels": build_info()["version"],
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        **({"before": before} if before is not None else {}),
    }


def public_name(source: str) -> str:
    """Of a model on a hub its name; of one on this machine no more than the end of its path."""
    path = Path(source)
    local = path.is_absolute() or path.exists() or len(path.parts) > 2
    return path.name if local else source


def forget_top_level(config: Any) -> None:
    """Takes out, in place, the length beside rope_parameters: it would enter those that follow."""
    if _note(config) is not None and hasattr(config, TOP_LEVEL):
        delattr(config, TOP_LEVEL)


def undo_export(config: Any) -> None:
    """Takes an export's own changes out of a config whose positions return, in place.

    Raises:
        ValueError: the weights are not those of the model that had positions.
    """
    note = _note(config)
    if note is None:
        return
    if not note["restorable"]:
        raise ValueError(
            "model: expected an export whose weights are those of the model with positions, got "
            "one with a temperature folded into them, or with norms of another architecture; load "
            f"the model it was made from: {note['source']}"
        )
    forget_top_level(config)
    config.max_position_embeddings = note["max_position_embeddings"]


def seal(folder: Path) -> None:
    """Writes the checksums of an export's files, as sha256sum does: `is_export` knows it by them.

    The config alone would not do: what is trained and saved by transformers keeps it.
    """
    (folder / SUMS).write_bytes(_sums(folder))


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export as it was written, and nothing else."""
    file = folder / SUMS
    return file.is_file() and file.read_bytes() == _sums(folder)


def _sums(folder: Path) -> bytes:
    lines = []
    for file in sorted(x for x in folder.rglob("*") if x.is_file() and x.name != SUMS):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()


def _note(config: Any) -> dict[str, Any] | None:
    note: dict[str, Any] | None = (getattr(config, "drope", None) or {}).get("export")
    return note
