"""`read_documents`: training texts one document at a time, from files and datasets of all kinds."""

from __future__ import annotations

import codecs
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drope_kernels.texts.columns import (
    NO_VALUE,
    columns_of,
    columns_of_schema,
    no_text,
    shown,
    value_at,
)
from drope_kernels.texts.compression import BrokenStreamError, compression_name, opened
from drope_kernels.texts.sources import Kind, Source, find_sources

MAX_WARNINGS = 10  # further corrupt parts are only counted
_ROWS_AT_ONCE = 64  # of Parquet, whose row groups may be larger than memory
_NOTHING = object()
_CSV_BLOCK = 1 << 26  # bytes; pyarrow holds a row to one block


@dataclass(frozen=True)
class Document:
    """A text that begins and ends by itself."""

    text: str
    source: str  # file or dataset
    line: int | None  # line of a file, row of a table, from 1; None: the whole file


# Called with place, what was expected, what came: raises, or returns where such parts are skipped.
Corrupt = Callable[[str, str, str], None]


def read_documents(
    sources: Any, *, text_column: str = "text", skip_corrupt: bool = False
) -> Documents:
    """The documents of files, folders and datasets, read as they are iterated over.

    A text file (.txt, .md, .rst) is one document; lines of JSON (.jsonl, .ndjson, .json), objects
    of one list (.json), rows of a table with a header (.csv, .tsv), of Parquet and of a dataset
    hold one each in `text_column`. All but Parquet may be compressed (.gz, .bz2, .xz, .zst).
    Folders are read in sorted order, with their folders; a folder made by
    `datasets.Dataset.save_to_disk` is one dataset. Text is UTF-8.

    Args:
        sources: a path, a `datasets.Dataset`, or an iterable of these, of one kind or several.
        text_column: name of the column or key; `data.text` is `text` within `data`.
        skip_corrupt: leave out what cannot be read instead of stopping: counted in
            `Documents.num_corrupt`, the first with a warning each.

    Raises:
        ValueError: no sources, paths that are not there, unknown kinds of files. While iterating:
            broken lines, rows or files, with file and line.
        TypeError: a stream.
        ImportError: a missing package (pyarrow, datasets).
    """
    return Documents(find_sources(sources), text_column, skip_corrupt)


def split_files(documents: Iterable[Document], mark: str | None) -> Iterator[Document]:
    """The same, but text files as the documents between the marks that they spell.

    Rows stay whole: in them marks may stand between the turns of a conversation.
    """
    for document in documents:
        if mark is None or document.line is not None or mark not in document.text:
            yield document
            continue
        parts = [part for part in document.text.split(mark) if part.strip()]
        for part in parts or [""]:
            yield Document(part, document.source, None)


class Documents:
    """What `read_documents` returns; each iteration reads from the start."""

    def __init__(self, sources: tuple[Source, ...], text_column: str, skip_corrupt: bool) -> None:
        self.sources, self.text_column, self.skip_corrupt = sources, text_column, skip_corrupt
        self.num_corrupt = 0  # in the latest iteration

    def __iter__(self) -> Iterator[Document]:
        self.num_corrupt = 0
        for source in self.sources:
            yield from _READERS[source.kind](source, self.text_column, self._corrupt)
        if self.num_corrupt > MAX_WARNINGS:
            warnings.warn(f"{self.num_corrupt} corrupt parts were left out in all", stacklevel=2)

    def record(self) -> dict[str, Any]:
        """What tells these documents from others; plain JSON."""
        return {
            "text_column": self.text_column,
            "skip_corrupt": self.skip_corrupt,
            "sources": [source.record() for source in self.sources],
        }

    def are_those_of(self, record: Mapping[str, Any]) -> bool:
        """Whether reading again would give what was read when the record was made."""
        return (
            self.text_column == record["text_column"]
            and self.skip_corrupt == record["skip_corrupt"]
            and len(self.sources) == len(record["sources"])
            and all(map(Source.is_that_of, self.sources, record["sources"]))
        )

    def _corrupt(self, place: str, expected: str, got: str) -> None:
        problem = f"{place}: expected {expected}, got {got}"
        if not self.skip_corrupt:
            raise ValueError(f"{problem}; mend or remove it, or pass skip_corrupt=True")
        self.num_corrupt += 1
        if self.num_corrupt <= MAX_WARNINGS:
            warnings.warn(f"{problem}; left out", stacklevel=2)


def _read_text(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    try:
        with opened(Path(source.name)) as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        corrupt(f"{source.name}, line {line}", "UTF-8", _byte(error))
        return
    except BrokenStreamError as error:
        corrupt(source.name, f"a whole {compression_name(Path(source.name))} file", str(error))
        return
    yield Document(text, source.name, None)


def _read_json_lines(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    number = 0
    try:
        with opened(Path(source.name)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from _read_json(line, source, number, column, corrupt)
    except BrokenStreamError as error:
        kind = compression_name(Path(source.name))
        corrupt(f"{source.name}, after line {number}", f"the rest of a {kind} file", str(error))


def _read_json_file(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    """Lines, or one list of objects: `.json` is used for both."""
    try:
        with opened(Path(source.name)) as file:
            start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
            content = start + file.read() if start.startswith(b"[") else None
    except BrokenStreamError as error:
        kind = compression_name(Path(source.name))
        corrupt(source.name, f"a whole {kind} file", str(error))
        return
    if content is None:
        yield from _read_json_lines(source, column, corrupt)
        return
    rows = _parsed(content, source.name, "a list of JSON objects", corrupt)
    for number, row in enumerate([] if rows is _NOTHING else rows, start=1):
        yield from _read_object(row, source, number, column, corrupt)


def _read_json(
    line: bytes, source: Source, number: int, column: str, corrupt: Corrupt
) -> Iterator[Document]:
    place = _place(source, number)
    content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    row = _parsed(content, place, "a JSON object", corrupt)
    if row is not _NOTHING:
        yield from _read_object(row, source, number, column, corrupt)


def _parsed(content: bytes, place: str, expected: str, corrupt: Corrupt) -> Any:
    """The JSON value, or _NOTHING where it has none."""
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        corrupt(place, "UTF-8", _byte(error))
    except (ValueError, RecursionError) as error:
        corrupt(place, expected, f"{shown(content)} ({error})")
    return _NOTHING


def _read_object(
    row: Any, source: Source, number: int, column: str, corrupt: Corrupt
) -> Iterator[Document]:
    place = _place(source, number)
    if not isinstance(row, dict):
        corrupt(place, "a JSON object", f"a {type(row).__name__}")
    elif (value := value_at(row, column)) is NO_VALUE:
        corrupt(place, f"the key {column!r}", f"the keys {columns_of(row)}")
    else:
        yield from _checked(value, source, number, column, corrupt)


def _read_table(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    import pyarrow
    from pyarrow import csv

    parse = csv.ParseOptions(
        delimiter="\t" if ".tsv" in Path(source.name).suffixes else ",", newlines_in_values=True
    )
    only = csv.ConvertOptions(include_columns=[column], column_types={column: pyarrow.string()})
    number = 0
    try:
        with opened(Path(source.name)) as file:
            read = csv.ReadOptions(block_size=_CSV_BLOCK)
            for batch in csv.open_csv(file, read, parse, only):
                for cell in batch.column(0):
                    number += 1
                    yield from _checked(cell.as_py(), source, number, column, corrupt)
    except BrokenStreamError as error:
        kind = compression_name(Path(source.name))
        corrupt(f"{source.name}, after row {number}", f"the rest of a {kind} file", str(error))
    except KeyError as error:
        corrupt(source.name, f"the column {column!r} in its first line", shown(str(error)))
    except pyarrow.ArrowException as error:
        corrupt(f"{source.name}, after row {number}", "rows of a table", shown(str(error), 200))


def _read_parquet(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(source.name) as file:
            schema = file.schema_arrow
            if not _has_column(schema, column):
                got = f"the columns {columns_of_schema(schema)}"
                corrupt(source.name, f"the column {column!r}", got)
                return
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for cell in batch.column(0):
                    number += 1
                    inner = "" if column in schema.names else column.partition(".")[2]
                    yield from _read_cell(cell, source, number, column, inner, corrupt)
    except (OSError, pyarrow.ArrowException) as error:
        place = source.name if number == 0 else f"{source.name}, after row {number}"
        corrupt(place, "a whole Parquet file", shown(str(error)))


def _has_column(fields: Any, column: str) -> bool:
    """Whether a pyarrow schema, or a struct in it, has this column or path."""
    types = {field.name: field.type for field in fields}
    first, dot, rest = column.partition(".")
    if column in types or not dot or first not in types:
        return column in types
    return str(types[first]).startswith("struct<") and _has_column(types[first], rest)


def _read_cell(
    cell: Any, source: Source, number: int, column: str, inner: str, corrupt: Corrupt
) -> Iterator[Document]:
    try:
        value = value_at(cell.as_py(), inner) if inner else cell.as_py()
        value = None if value is NO_VALUE else value
    except UnicodeDecodeError as error:
        corrupt(_place(source, number), "UTF-8", _byte(error))
    else:
        yield from _checked(value, source, number, column, corrupt)


def _read_dataset(source: Source, column: str, corrupt: Corrupt) -> Iterator[Document]:
    import pyarrow
    from datasets import load_from_disk

    number = 0
    try:
        rows = load_from_disk(source.name) if source.dataset is None else source.dataset
        schema = rows.features.arrow_schema
        if not _has_column(schema, column):
            got = f"the columns {columns_of_schema(schema)}"
            corrupt(source.name, f"the column {column!r}", got)
            return
        first = column if column in rows.column_names else column.partition(".")[0]
        for number, row in enumerate(rows.with_format(None).select_columns([first]), start=1):
            value = value_at(row, column)
            value = None if value is NO_VALUE else value
            yield from _checked(value, source, number, column, corrupt)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        place = source.name if number == 0 else f"{source.name}, after row {number}"
        corrupt(place, "a whole dataset", shown(str(error)))


def _checked(
    value: Any, source: Source, number: int, column: str, corrupt: Corrupt
) -> Iterator[Document]:
    place = _place(source, number)
    if not isinstance(value, str):
        corrupt(place, f"a string as {column!r}", no_text(value))
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        corrupt(place, "text", f"the half character {value[error.start]!a}")
        return
    yield Document(value, source.name, number)


def _place(source: Source, number: int) -> str:
    return f"{source.name}, {'line' if source.kind == 'json lines' else 'row'} {number}"


def _byte(error: UnicodeDecodeError) -> str:
    return f"the byte {error.object[error.start]:#04x}"


_READERS: dict[Kind, Callable[[Source, str, Corrupt], Iterator[Document]]] = {
    "text": _read_text,
    "json lines": _read_json_lines,
    "json": _read_json_file,
    "table": _read_table,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}
