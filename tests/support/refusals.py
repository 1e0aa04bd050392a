"""Wrong calls and the message that each must raise, in four parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

MESSAGE = re.compile(
    r"^(?P<argument>[^:]+): expected (?P<expected>.+?), got (?P<got>.+?); (?P<remedy>.+)$",
    re.DOTALL,
)


@dataclass(frozen=True)
class Bad:
    """A wrong call and a piece of each part of the message it must raise."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    argument: str
    expected: str
    got: str
    remedy: str


def check_message(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        bad.call()
    message = str(caught.value)
    parts = MESSAGE.match(message)
    assert parts, f"not 'argument: expected E, got G; remedy': {message}"
    assert parts["argument"] == bad.argument, message
    for part in ("expected", "got", "remedy"):
        assert getattr(bad, part) in parts[part], f"{part} lacks {getattr(bad, part)!r}: {message}"
