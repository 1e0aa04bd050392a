"""Where training texts lie: files, folders, saved or live `datasets`; how to know them again."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drope_kernels.texts.compression import COMPRESSIONS, compression_of

Kind = Literal["text", "json lines", "json", "table", "parquet", "dataset"]
KIND_OF_SUFFIX: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
_KNOWN = (
    f".txt .md .rst .jsonl .ndjson .json .csv .tsv (each also with {' '.join(COMPRESSIONS)}), "
    ".parquet"
)
# They hold texts as a rule, and nothing here reads them: passed by, they would be missed.
_UNREAD_TEXTS = frozenset(
    [
        *(".text", ".tex", ".htm", ".html", ".xml", ".yaml", ".yml"),
        *(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx"),
        *(".arrow", ".feather", ".orc", ".avro", ".npy", ".bin", ".db", ".sqlite", ".warc", ".wet"),
        *(".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".br", ".zstd"),
    ]
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_PACKAGES: dict[str, tuple[str, str]] = {  # what is imported, and the extra that brings it
    ".zst": ("pyarrow", "train"),
    "table": ("pyarrow.csv", "train"),
    "parquet": ("pyarrow.parquet", "train"),
    "dataset": ("datasets", "datasets"),
}


@dataclass(frozen=True)
class Source:
    """One file, or one dataset of the package `datasets`."""

    name: str  # path; of a live dataset its fingerprint
    kind: Kind
    dataset: Any = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """What tells this source from another one; plain JSON."""
        if self.kind == "dataset":
            return {"name": self.name, "fingerprint": self._fingerprint()}
        stat = Path(self.name).stat()
        return {
            "name": self.name,
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "sha256": self._sha256(),
        }

    def is_that_of(self, record: dict[str, Any]) -> bool:
        """Whether the content is that of the record; hashed only where size and time do not say."""
        if self.kind == "dataset":
            return bool(self._fingerprint() == record.get("fingerprint"))
        stat = Path(self.name).stat()
        if stat.st_size != record.get("bytes"):
            return False
        unchanged = (self.name, stat.st_mtime_ns) == (record["name"], record["modified_ns"])
        return unchanged or self._sha256() == record["sha256"]

    def _sha256(self) -> str:
        with Path(self.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _fingerprint(self) -> str:
        if self.dataset is not None:
            return str(self.dataset._fingerprint)
        file = Path(self.name) / "state.json"
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["_fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}: expected the state of a saved dataset, got {type(error).__name__}: "
                f"{error}; save the dataset again"
            ) from error


def find_sources(sources: Any) -> tuple[Source, ...]:
    """Every file and dataset that `sources` names, in order; folders sorted and recursive.

    In a folder other kinds of files are passed by with a warning; a link to a folder that was
    walked already is not followed again.

    Args:
        sources: a path, a `datasets.Dataset`, or an iterable of these.

    Raises:
        ValueError: a path that is not there, a kind of file that is not known, in a folder one that
            texts come in, nothing to read.
        TypeError: a stream, or something else that is no source.
        ImportError: a package that a source needs.
    """
    if isinstance(sources, str | Path | dict) or hasattr(sources, "column_names"):
        sources = [sources]
    found = [one for source in sources for one in _expand(source)]
    if not found:
        raise ValueError("sources: expected at least one file, folder or dataset, got none")
    for source in found:
        _check_no_pointer(source)
        _require_package(source, source.kind)
        _require_package(source, compression_of(Path(source.name)) or "")
    _warn_of_repeated(found)
    return tuple(found)


def _check_no_pointer(source: Source) -> None:
    path = Path(source.name)
    if source.dataset is not None or path.is_dir():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path}: expected texts, got git-lfs's pointer to them; fetch them with git lfs "
                "pull"
            )


def _warn_of_repeated(found: list[Source]) -> None:
    """A file that is read twice, under whatever name, counts twice in all that follows."""
    sizes: dict[Any, list[int]] = {}
    for source in found:
        path = Path(source.name)
        what = source.name if source.dataset is not None else path.resolve()
        sizes.setdefault(what, []).append(path.stat().st_size if path.is_file() else 0)
    repeated = [what for what, each in sizes.items() if len(each) > 1]
    if not repeated:
        return
    again = sum(sum(sizes[what][1:]) for what in repeated)
    total = sum(map(sum, sizes.values()))
    share = f", {again / total:.0%} of the bytes" if again else ""
    more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
    warnings.warn(
        f"sources: {repeated[0]}{more} named more than once and read as often{share}; name it once",
        stacklevel=2,
    )


def _expand(source: Any) -> Iterator[Source]:
    if isinstance(source, str | Path):
        yield from _expand_path(Path(source))
    elif isinstance(source, dict):  # a DatasetDict
        raise ValueError(
            f"sources: expected one split, got a dictionary of the splits {sorted(source)}; pass "
            "those to train on"
        )
    elif hasattr(source, "_fingerprint"):
        yield Source(f"dataset {source._fingerprint}", "dataset", source)
    else:
        raise TypeError(
            f"sources: expected paths or a datasets.Dataset, got {type(source).__name__}; write a "
            "stream to a .jsonl or .parquet file first"
        )


def _expand_path(path: Path) -> Iterator[Source]:
    if path.is_dir():
        yield from _expand_folder(path)
        return
    if not path.exists():
        raise ValueError(f"{path}: expected a file or a folder of texts, got a path without either")
    kind = _kind_of(path)
    if kind is None:
        raise ValueError(
            f"{path}: expected one of {_KNOWN}, got another kind of file; rename or convert it"
        )
    yield Source(str(path), kind)


def _expand_folder(folder: Path) -> Iterator[Source]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(one.name for one in folder.iterdir() if one.is_dir())
        raise ValueError(
            f"{folder}: expected one split of a saved dataset, got a folder of the splits "
            f"{splits}; name those to train on"
        )
    walk = _Walk(folder)
    found = list(walk.sources(folder))
    walk.tell_what_was_left()
    if not found:
        raise ValueError(
            f"{folder}: expected a folder with files of the kinds {_KNOWN}, or a saved dataset, "
            "got one without any"
        )
    yield from found


class _Walk:
    """One way through a folder and those in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.walked: set[Path] = set()  # a folder may link to itself
        self.unread: list[Path] = []  # of _UNREAD_TEXTS
        self.passed_by: Counter[str] = Counter()  # others, such as pictures beside a text

    def sources(self, folder: Path) -> Iterator[Source]:
        real = folder.resolve()
        if real in self.walked:
            return
        self.walked.add(real)
        if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
            yield Source(str(folder), "dataset")
            return
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from self.sources(path)
            elif (kind := _kind_of(path)) is not None:
                yield Source(str(path), kind)
            elif compression_of(path) or path.suffix.lower() in _UNREAD_TEXTS:
                self.unread.append(path)
            else:
                self.passed_by[path.suffix or path.name] += 1

    def tell_what_was_left(self) -> None:
        """Raises for files that must not be missed, warns of the others."""
        if self.unread:
            more = f" and {len(self.unread) - 1} more" if len(self.unread) > 1 else ""
            raise ValueError(
                f"{self.folder}: expected files of the kinds {_KNOWN}, got {self.unread[0]}{more}, "
                "which would not be read; convert it, move it elsewhere, or name the files to read"
            )
        if self.passed_by:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.passed_by.items())
            warnings.warn(f"{self.folder}: no texts, passed by: {kinds}", stacklevel=2)


def _kind_of(path: Path) -> Kind | None:
    compression = compression_of(path)
    kind = KIND_OF_SUFFIX.get((path.with_suffix("") if compression else path).suffix.lower())
    return None if kind == "parquet" and compression else kind


def _require_package(source: Source, kind: str) -> None:
    """Imports it now, so that a missing one is not found after an hour of reading."""
    if kind not in _PACKAGES:
        return
    package, extra = _PACKAGES[kind]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{source.name}: reading a {kind} needs {package}, and {error.name} is missing: "
            f"pip install 'drope_kernels[{extra}]'"
        ) from error
