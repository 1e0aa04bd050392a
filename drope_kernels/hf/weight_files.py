"""Whether a model's files are what they are called: seen from their ends, without reading them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLE = b"\x80"  # what torch wrote before 1.6
# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_files(folder: Path) -> None:
    """No file that transformers reads here is cut, missing, or git-lfs's stand-in for one.

    Raises:
        FileNotFoundError: no weights, or not all that their index names.
        ValueError: a file that is no whole one.
    """
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.model")):
        check_no_pointer(path)
    for path in _weight_files(folder):
        if not path.is_file():
            raise FileNotFoundError(
                f"source: expected weights in {folder}, got no {path.name}; copy the whole folder"
            )
        check_no_pointer(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        else:
            _check_torch_file(path)


def check_no_pointer(path: Path) -> None:
    """ValueError for the few lines that git-lfs leaves in the place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"source: expected the content of {path}, got git-lfs's pointer to it; fetch it "
                "with git lfs pull"
            )


def _weight_files(folder: Path) -> Iterator[Path]:
    for name in _WEIGHTS:
        if (folder / name).exists():
            yield folder / name
            return
        index = folder / f"{name}.index.json"
        if index.exists():
            yield from (folder / part for part in sorted(_parts(index)))
            return
    if not (folder / "adapter_config.json").exists():  # whose base lies elsewhere
        yield folder / _WEIGHTS[0]


def _parts(index: Path) -> set[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return set(content["weight_map"].values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"source: expected an index of weights in {index}, got {type(error).__name__}: "
            f"{error}; copy it again"
        ) from error


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"source: expected whole weights in {path}, got a file that cannot be read ({error}); "
            "copy it again"
        ) from error


def _check_torch_file(path: Path) -> None:
    """An archive ends with its table of contents, so a cut one has none."""
    with path.open("rb") as file:
        begins = file.read(len(_PICKLE))
    if begins != _PICKLE and not zipfile.is_zipfile(path):
        raise ValueError(
            f"source: expected whole weights in {path}, got {path.stat().st_size} bytes that end "
            "before their table of contents, or no weights of torch; copy it again"
        )
