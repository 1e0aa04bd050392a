"""A GGUF file opened for reading, and its metadata."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from drope_kernels.console.paths import user_path


def opened(source: str | Path) -> tuple[Path, Any]:
    """The file and its `gguf.GGUFReader`.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
        FileNotFoundError: no such file.
        ValueError: not a whole GGUF file.
    """
    path = user_path(source)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"{path}: expected the package gguf, which reads GGUF files, it is not installed; "
            "pip install 'drope_kernels[gguf]'"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a GGUF file, there is none")
    from gguf import GGUFReader

    try:
        return path, GGUFReader(path)
    except (ValueError, IndexError) as error:  # of files cut short: their numbers make no sense
        raise ValueError(
            f"{path}: expected a whole GGUF file, got one that cannot be read ({error}); "
            "copy or download it again"
        ) from error


def field(reader: Any, key: str) -> Any:
    """What the metadata says under a key; None: nothing."""
    entry = reader.get_field(key)
    return None if entry is None else entry.contents()
