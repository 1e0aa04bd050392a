"""`PackedFolder`: token streams of documents in files that are whole whenever they exist."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
FORMAT = 1
METADATA = "packed.json"
_PARTIAL_PREFIX = ".partial-"  # a folder being written; its last act is to lose this prefix
_STARTS = np.dtype("<i8")


def _tokens_file(split: Split) -> str:
    return f"{split}.tokens"


def _starts_file(split: Split) -> str:
    return f"{split}.starts"


@dataclass(frozen=True)
class PackedFolder:
    """The documents of both splits as one stream of token ids each, EOS behind every document, and
    BOS before it where the tokenizer begins texts so.

    Files: `train.tokens` and `validation.tokens` (uint16 or uint32, little endian),
    `train.starts` and `validation.starts` (int64: where each document begins, then the end),
    `packed.json` (`metadata`: counts, tokenizer, sources, settings, versions).
    """

    path: Path
    metadata: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> PackedFolder:
        """Opens a folder of `pack_documents`.

        Raises:
            ValueError: another kind of folder, one of another format, files that lack something.
        """
        path = Path(folder)
        if not (path / METADATA).is_file():
            raise ValueError(
                f"{path}: expected a folder of packed documents, got one without {METADATA}; make "
                "it with pack_documents"
            )
        try:
            metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path / METADATA}: expected JSON, got {error}; delete the folder and pack again"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: expected packed documents of format {FORMAT}, got "
                f"{metadata.get('format')}; delete the folder and pack again"
            )
        packed = cls(path, metadata)
        for split in SPLITS:
            packed._check_sizes(split)
        return packed

    def tokens(self, split: Split) -> np.ndarray[Any, Any]:
        """(T,) token ids, mapped from the file, read-only."""
        return _mapped(self.path / _tokens_file(split), self.dtype)

    def starts(self, split: Split) -> np.ndarray[Any, Any]:
        """(N + 1,) int64: index of each document's first token, then T."""
        return _mapped(self.path / _starts_file(split), _STARTS)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.metadata["dtype"])

    @property
    def vocabulary_size(self) -> int:
        """The tokenizer's largest id + 1."""
        return int(self.metadata["tokenizer"]["vocabulary_size"])

    def num_documents(self, split: Split) -> int:
        return int(self.metadata["splits"][split]["documents"])

    def num_tokens(self, split: Split) -> int:
        return int(self.metadata["splits"][split]["tokens"])

    def largest_token(self, split: Split) -> int:
        """The largest id that occurs; -1 in an empty split."""
        return int(self.metadata["splits"][split]["largest_token"])

    @property
    def held_out_seen(self) -> float:
        """Share of the held-out text that is in the training text too."""
        return float(self.metadata.get("held_out_seen", 0.0))

    def fingerprint(self, split: Split) -> str:
        """A hash of the split's tokens and starts, taken when they were written."""
        return str(self.metadata["splits"][split]["sha256"])

    def _check_sizes(self, split: Split) -> None:
        for name, wanted in (
            (_tokens_file(split), self.num_tokens(split) * self.dtype.itemsize),
            (_starts_file(split), (self.num_documents(split) + 1) * _STARTS.itemsize),
        ):
            path = self.path / name
            got = path.stat().st_size if path.is_file() else None
            if got != wanted:
                raise ValueError(
                    f"{path}: expected {wanted} bytes, got {'no file' if got is None else got}; "
                    "delete the folder and pack again"
                )


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class SplitWriter:
    """Appends documents to the two files of a split."""

    def __init__(
        self, folder: Path, split: Split, dtype: np.dtype[Any], eos: int, bos: int | None = None
    ) -> None:
        self.folder, self.split, self.dtype, self.eos, self.bos = folder, split, dtype, eos, bos
        with _explained(folder):
            self.tokens = (folder / _tokens_file(split)).open("wb")
            self.starts = (folder / _starts_file(split)).open("wb")
        self.begin = 0  # of the document being written
        self.num_tokens, self.num_documents, self.largest_token = 0, 0, -1
        self.last_token = -1
        self.sha256 = hashlib.sha256()
        self._append(self.starts, np.zeros(1, _STARTS))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _explained(self.folder), self.tokens, self.starts:
            if kind is None:
                for file in (self.tokens, self.starts):
                    _settle(file)

    def write(self, ids: list[int]) -> None:
        """Goes on with a document, or begins one: with BOS, unless the text brought its own."""
        if ids and self.bos is not None and self.num_tokens == self.begin and ids[0] != self.bos:
            ids = [self.bos, *ids]
        if ids:
            self.num_tokens += len(ids)
            self.last_token = ids[-1]
            self.largest_token = max(self.largest_token, max(ids))
            self._append(self.tokens, np.array(ids, self.dtype))

    def end_document(self) -> bool:
        """EOS, unless the text brought its own; False, and nothing written, without any token."""
        if self.num_tokens == self.begin:
            return False
        if self.last_token != self.eos:
            self.write([self.eos])
        self.begin = self.num_tokens
        self.num_documents += 1
        self._append(self.starts, np.array([self.begin], _STARTS))
        return True

    def written(self) -> np.ndarray[Any, Any]:
        """The ids of all documents, once the writer is closed."""
        return _mapped(self.folder / _tokens_file(self.split), self.dtype)

    def read_documents(self) -> list[list[int]]:
        """What was written, once it is closed: the ids of each document, EOS included."""
        tokens = np.fromfile(self.folder / _tokens_file(self.split), self.dtype)
        starts = np.fromfile(self.folder / _starts_file(self.split), _STARTS)
        return [document.tolist() for document in np.split(tokens, starts[1:-1])]

    def counts(self) -> dict[str, Any]:
        return {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "largest_token": self.largest_token,
            "sha256": self.sha256.hexdigest(),
        }

    def _append(self, file: IO[bytes], values: np.ndarray[Any, Any]) -> None:
        content = values.tobytes()
        self.sha256.update(content)
        with _explained(self.folder):
            file.write(content)


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """The last file of a folder, without which it is none."""
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    with _explained(folder), (folder / METADATA).open("wb") as file:
        file.write(text.encode() + b"\n")
        _settle(file)


def _settle(file: IO[bytes]) -> None:
    """On the disk, or a crash of the machine would leave it short behind a name that is whole."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says what could not be written, and that it does no harm."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: expected to write into {folder.parent}; make room there or choose "
            "another folder (nothing half-written stays)",
        ) from error


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, which gets its name in the end or vanishes."""
    partial = folder.with_name(_PARTIAL_PREFIX + folder.name)
    with _explained(partial):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # of a process that was killed
            shutil.rmtree(partial)
        partial.mkdir()
    try:
        yield partial
        with _explained(partial):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that would write `folder` do so one after the other; the others wait here."""
    path = folder.with_name(f".lock-{folder.name}")
    with _explained(path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, folder)
    try:
        yield
    finally:
        path.unlink()
        lock.close()


def _locked(path: Path, folder: Path) -> IO[bytes]:
    while True:
        lock = path.open("ab")  # for writing, or NFS would refuse to lock it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"{folder}: waiting for the process that is writing it", stacklevel=5)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                return lock
        lock.close()  # the process before has taken it away
