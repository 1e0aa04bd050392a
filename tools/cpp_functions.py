"""Finds the functions of a C++ file by their braces: no compiler, so `make check` needs none.

Comments and literals are blanked first. A `{` opens a scope (namespace, class, ...), a function
(its header has a parameter list) or an initialiser; lambdas belong to the function around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMMENT_OR_LITERAL = re.compile(
    r'R"(?P<tag>\w*)\(.*?\)(?P=tag)"|//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'",
    re.DOTALL,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_SCOPE = re.compile(
    r'^\s*(?:inline\s+|typedef\s+)*(?:namespace|class|struct|union|enum|extern\s*"")'
)
_MEMBER_INITIALISER = re.compile(r"\)[^;{}]*[:,]\s*[\w:<>]+\s*$")
_NAME = re.compile(r"(operator\s*[^\s\w(]+|operator\s*\(\s*\)|[\w~]+)\s*\(")
_NOT_A_NAME = {
    *("if", "for", "while", "switch", "catch", "return", "requires"),
    *("alignas", "decltype", "noexcept", "__attribute__", "__launch_bounds__"),
}


@dataclass(frozen=True)
class Function:
    name: str
    first_line: int
    last_line: int
    num_template_parameters: int

    @property
    def num_lines(self) -> int:
        return self.last_line - self.first_line + 1


def _blank(match: re.Match[str]) -> str:
    text = match.group()
    kept = '""' if text.startswith('"') else ""
    return kept + re.sub(r"[^\n]", " ", text[len(kept) :])


def strip_comments(text: str) -> str:
    """The text with comments and literals blanked, every line still in its place."""
    return _COMMENT_OR_LITERAL.sub(_blank, text)


def _split_template(header: str) -> tuple[int, str]:
    """Number of parameters of the leading template<...> clauses, and the header without them."""
    total = 0
    while match := re.match(r"\s*template\s*<", header):
        depth, end, commas = 1, match.end(), 0
        while end < len(header) and depth:
            character = header[end]
            depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
            commas += character == "," and depth == 1
            end += 1
        inside = header[match.end() : end - 1].strip()
        total += commas + 1 if inside else 0
        header = header[end:]
    return total, header


def _function_name(header: str) -> str | None:
    """The name that a header before `{` declares, or None when it declares no function."""
    if _SCOPE.match(header) or re.search(r"[=\]]\s*$|^\s*(?:else|do|try)?\s*$", header):
        return None
    depth, flat = 0, []
    for character in header:  # keep only what stands outside angle brackets
        depth += {"<": 1, ">": -1}.get(character, 0)
        flat.append(" " if depth > 0 or character == ">" else character)
    names = [name for name in _NAME.findall("".join(flat)) if name not in _NOT_A_NAME]
    return re.sub(r"\s+", "", names[0]) if names else None


def find_functions(text: str) -> Iterator[Function]:
    """Every function with a body, in order of its end."""
    code = _DIRECTIVE.sub(_blank, strip_comments(text))
    header_start, line = 0, 1
    stack: list[tuple[str, str, int, int]] = []  # kind, name, first line, template parameters
    for position, character in enumerate(code):
        line += character == "\n"
        in_function = any(kind == "function" for kind, *_ in stack)
        if in_function and character not in "{}":
            continue
        if character == ";":
            header_start = position + 1
        elif character == "{":
            header = code[header_start:position]
            if not in_function and _MEMBER_INITIALISER.search(header):
                stack.append(("initialiser", "", line, 0))
                continue
            num_parameters, declaration = _split_template(header)
            name = None if in_function else _function_name(declaration)
            blank_lines = len(header) - len(header.lstrip())
            first_line = line - header[blank_lines:].count("\n")
            stack.append(("function" if name else "scope", name or "", first_line, num_parameters))
            header_start = position + 1
        elif character == "}" and stack:
            kind, name, first_line, num_parameters = stack.pop()
            if kind == "function":
                yield Function(name, first_line, line, num_parameters)
            if kind != "initialiser":
                header_start = position + 1
