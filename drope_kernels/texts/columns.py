"""Where in a row its text is: a column, or a path with dots through nested ones, `data.text`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SHOWN = 60  # characters of what came instead
_NAMED = 5  # columns with texts, at most
NO_VALUE = object()


def value_at(row: Any, column: str) -> Any:
    """What the row has there, or NO_VALUE; a column with just that name comes before a path."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    if not dot or not isinstance(row, Mapping) or first not in row:
        return NO_VALUE
    return value_at(row[first], rest)


def columns_of(row: Mapping[str, Any]) -> str:
    """A row's columns, and those in which there are texts: for an error about another one."""
    return f"{shown(str(list(row)))}{_naming(_texts_in(row))}"


def columns_of_schema(schema: Any) -> str:
    """The same of a pyarrow schema."""
    return f"{shown(str(list(schema.names)))}{_naming(_strings_in(schema))}"


def no_text(value: Any) -> str:
    """A value that is no text: for an error."""
    got = shown(repr(value))
    rows = value if isinstance(value, list) else [value]
    if rows and all(isinstance(one, Mapping) and "content" in one for one in rows):
        return (
            f"{got}, the messages of a conversation; write each as one text first, as "
            "tokenizer.apply_chat_template does"
        )
    return got + (_naming(_texts_in(value)) if isinstance(value, Mapping) else "")


def shown(content: bytes | str, most: int = _SHOWN) -> str:
    """Enough of it to be recognised."""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _naming(paths: Iterator[str]) -> str:
    found = [path for path, _ in zip(paths, range(_NAMED), strict=False)]
    return f" (text_column may be {' or '.join(found)})" if found else ""


def _texts_in(row: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, str):
            yield f"{before}{name}"
        elif isinstance(value, Mapping):
            yield from _texts_in(value, f"{before}{name}.")


def _strings_in(fields: Any, before: str = "") -> Iterator[str]:
    for field in fields:
        kind = str(field.type)
        if kind in ("string", "large_string", "string_view"):
            yield f"{before}{field.name}"
        elif kind.startswith("struct<"):
            yield from _strings_in(field.type, f"{before}{field.name}.")
