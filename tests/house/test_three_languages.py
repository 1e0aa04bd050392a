"""docs/one-algorithm-three-languages.md says what the sources say, in all three languages.

Its excerpts are verbatim, its names exist where it says, and names that all languages share are
shared. A rename in one language fails here until the document, or the other languages, follow.
"""

from __future__ import annotations

import io
import keyword
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest
from repository import ROOT

DOCUMENT = ROOT / "docs" / "one-algorithm-three-languages.md"
FOLDERS = {
    "CPU": "csrc/cpu",
    "CUDA": "csrc/cuda/attention",
    "Triton": "drope_kernels/backends/triton",
}
# Law in every language; each has a row of the table of names.
GLOSSARY = (
    *("BLOCK_Q", "BLOCK_KV", "HEAD_DIM", "acc_s", "p", "row_max", "row_sum", "row_scale", "acc_o"),
    *(
        "lse",
        "delta",
        "scale_log2",
        "exponent",
        "softmax_state",
        "q_block",
        "kv_block",
        "head",
        "kv_head",
        "batch",
    ),
)
CPP_NOISE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
OMITTED = re.compile(r"^\s*(?://|#) \.\.\.$")
Read = Callable[[str], str]


def read(path: str) -> str:
    """A file of the repository; empty where there is none."""
    there = ROOT / path
    return there.read_text() if there.is_file() else ""


@cache
def identifiers(path: str, text: str) -> frozenset[str]:
    """The words of the code itself: what comments and strings say is no name."""
    if path.endswith(".py"):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = {token.string for token in tokens if token.type == tokenize.NAME}
        return frozenset(word for word in found if not keyword.iskeyword(word))
    return frozenset(re.findall(r"[A-Za-z_]\w*", CPP_NOISE.sub(" ", text)))


# ---- excerpts


class Excerpt(NamedTuple):
    path: str
    lines: list[str]

    def pieces(self) -> list[list[str]]:
        """What stands between the lines that say that some were left out."""
        found: list[list[str]] = [[]]
        for line in self.lines:
            if OMITTED.match(line):
                found.append([])
            else:
                found[-1].append(line)
        return [piece for piece in found if piece]


def excerpts(document: str) -> list[Excerpt]:
    """Code blocks below a line that is nothing but the path of a file."""
    fenced = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [Excerpt(path, body.rstrip("\n").split("\n")) for path, body in fenced.findall(document)]


def flush(lines: list[str]) -> list[str]:
    """As far to the left as they go."""
    return textwrap.dedent("\n".join(lines)).split("\n")


def end_of(piece: list[str], lines: list[str], start: int) -> int | None:
    """Where the piece ends that stands in lines[start:]; None when it does not."""
    wanted, size = flush(piece), len(piece)
    starts = range(start, len(lines) - size + 1)
    return next((at + size for at in starts if flush(lines[at : at + size]) == wanted), None)


def wrong_excerpts(document: str, read: Read) -> Iterator[str]:
    for one in excerpts(document):
        lines, at = read(one.path).splitlines(), 0
        for piece in one.pieces():
            end = end_of(piece, lines, at)
            if end is None:
                yield f"{one.path}: does not hold\n{textwrap.indent(chr(10).join(piece), '    ')}"
                break
            at = end


# ---- the table of names


class Name(NamedTuple):
    name: str
    places: dict[str, list[tuple[str, str]]]  # language -> (path, symbol)
    why: str  # where a language has another word for it


def rows(document: str) -> list[list[str]]:
    """Cells of every table whose first column is called `name`."""
    found, inside = [], False
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "name":
            inside = True
            assert cells == ["name", *FOLDERS, "what, and why where words differ"]
        elif inside and not set(line) <= set("|-: "):
            found.append(cells)
    return found


def names(document: str) -> list[Name]:
    found = []
    for cells in rows(document):
        places = {}
        for language, cell in zip(FOLDERS, cells[1:-1], strict=True):
            pairs = re.findall(r"`([\w./]+):(\w+)`", cell)
            places[language] = [(located(language, path), symbol) for path, symbol in pairs]
        found.append(Name(cells[0].strip("`"), places, cells[-1]))
    return found


def located(language: str, path: str) -> str:
    """Paths are those of the language's folder, or of csrc for what two languages share."""
    return path if path.startswith("csrc/") else f"{FOLDERS[language]}/{path}"


def wrong_names(document: str, read: Read) -> Iterator[str]:
    found = names(document)
    known = {one.name for one in found}
    yield from (f"{name}: is law, and not in the table" for name in GLOSSARY if name not in known)
    for one in found:
        for language, places in one.places.items():
            for path, symbol in places:
                if symbol not in identifiers(path, read(path)):
                    yield f"{one.name}: {language} has no {symbol} in {path}"
            if one.name not in {symbol for _, symbol in places} and not one.why:
                yield f"{one.name}: {language} has another word, or none, and nobody says why"


# ---- the rooms


def wrong_rooms(document: str, read: Read) -> Iterator[str]:
    """Files that the table of rooms names exist; Triton has no file that no room holds."""
    named = set()
    for cells in re.findall(r"^\| \*\*.*$", document, re.MULTILINE):
        for language, cell in zip(FOLDERS, cells.strip("|").split("|")[1:], strict=False):
            named |= {located(language, path) for path in re.findall(r"`([\w./]+\.\w+)`", cell)}
    yield from (f"{path}: named as a room, and not there" for path in named if not read(path))
    here = ROOT / FOLDERS["Triton"]
    files = {f"{FOLDERS['Triton']}/{path.name}" for path in here.glob("*.py")}
    yield from (f"{path}: in no room of the document" for path in sorted(files - named))


def complaints(document: str, read: Read) -> list[str]:
    return [
        *wrong_excerpts(document, read),
        *wrong_names(document, read),
        *wrong_rooms(document, read),
    ]


# ---- tests


def test_document_says_what_the_sources_say() -> None:
    document = DOCUMENT.read_text()
    assert len(names(document)) > len(GLOSSARY)
    for folder in FOLDERS.values():
        assert any(one.path.startswith(folder) for one in excerpts(document))
    fences = re.findall(r"^```\w+$", document, re.MULTILINE)
    assert len(fences) == len(excerpts(document)), "a code block without its file above it"
    assert complaints(document, read) == []


@pytest.mark.parametrize("language", FOLDERS)
@pytest.mark.parametrize("name", ["row_scale", "acc_s", "scale_log2", "kv_head"])
def test_rename_in_one_language_is_noticed(language: str, name: str) -> None:
    """Comments keep the old word, as they do."""

    def renamed(path: str) -> str:
        text = read(path)
        if not path.startswith(FOLDERS[language]):
            return text
        comment = "#" if path.endswith(".py") else "//"
        lines = []
        for line in text.splitlines():
            code, mark, rest = line.partition(comment)
            lines.append(re.sub(rf"\b{name}\b", f"{name}_x", code) + mark + rest)
        return "\n".join(lines)

    found = complaints(DOCUMENT.read_text(), renamed)
    assert any(one.startswith(f"{name}: {language} has no {name} in ") for one in found), found


def test_changed_lines_and_lost_files_are_noticed() -> None:
    document = DOCUMENT.read_text()
    for one in excerpts(document):
        line = max(one.lines, key=len)

        def changed(path: str, one: Excerpt = one, line: str = line) -> str:
            text = read(path)
            return text.replace(line.strip(), "// ...") if path == one.path else text

        assert any(found.startswith(f"{one.path}: ") for found in complaints(document, changed))
    gone = f"{FOLDERS['Triton']}/softmax.py"
    without = complaints(document, lambda path: "" if path == gone else read(path))
    assert f"{gone}: named as a room, and not there" in without
    unlisted = document.replace("`block_range.py`", "`mask.py`")
    assert any(found.endswith("in no room of the document") for found in complaints(unlisted, read))


def test_a_word_of_ones_own_needs_a_reason() -> None:
    header = (
        "| name | CPU | CUDA | Triton | what, and why where words differ |\n|---|---|---|---|---|"
    )
    cells = "| `acc_s` | `lanes/attend.h:score_keys` | `shared/mask.h:acc_s` | `mask.py:acc_s` |"
    silent = list(wrong_names(f"{header}\n{cells}  |", read))
    assert "acc_s: CPU has another word, or none, and nobody says why" in silent
    told = list(wrong_names(f"{header}\n{cells} scores, key by key |", read))
    assert not [one for one in told if one.startswith("acc_s")]


def test_excerpt_may_leave_lines_out_but_not_swap_them() -> None:
    def source(path: str) -> str:
        return "if x:\n    one()\n    two()\n    three()\n"

    def page(*lines: str) -> str:
        return "`a.py`\n\n```python\n" + "\n".join(lines) + "\n```\n"

    for lines in (["two()", "three()"], ["one()", "# ...", "three()"], ["if x:", "    one()"]):
        assert list(wrong_excerpts(page(*lines), source)) == []
    for lines in (["one()", "three()"], ["three()", "# ...", "one()"], ["if x:", "one()"]):
        assert len(list(wrong_excerpts(page(*lines), source))) == 1
