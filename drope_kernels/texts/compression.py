"""Compressed files as a stream of bytes, by the ending of their name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def _open_zstandard(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, tuple[str, Callable[..., Any]]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
    ".zst": ("zstandard", _open_zstandard),
}
COMPRESSIONS = tuple(_OPENERS)


class BrokenStreamError(Exception):
    """A compressed file that cannot be read to its end."""


def compression_of(path: Path) -> str | None:
    """Its ending, if that is one of `COMPRESSIONS`."""
    ending = path.suffix.lower()
    return ending if ending in _OPENERS else None


def compression_name(path: Path) -> str:
    """As a sentence calls it."""
    ending = compression_of(path)
    return "plain" if ending is None else _OPENERS[ending][0]


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """What the file holds, decompressed while it is read.

    Raises:
        BrokenStreamError: it is no such compressed file, or not a whole one.
    """
    ending = compression_of(path)
    try:
        with path.open("rb") if ending is None else _OPENERS[ending][1](path) as file:
            yield file
    except OSError as error:
        if error.errno is not None:  # the system's; bzip2 and zstandard give none
            raise
        raise BrokenStreamError(str(error)) from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise BrokenStreamError(str(error)) from error
