"""CUDA C++ as C++: the three things in a kernel source that no header can define away.

- asm statements become calls of the interpreter, with the same text and the same operands;
- dynamic shared memory becomes a pointer to the emulator's;
- launches become calls of the emulator's launch.

Everything else is left as it is, line by line.
"""

from __future__ import annotations

import ast
import functools
import re

OPENING, CLOSING = "([{", ")]}"
ASM = re.compile(r"\basm\s*(?:volatile)?\s*\(")
DYNAMIC_SHARED = re.compile(
    r"\bextern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?"
    r"(?P<type>[\w:]+(?:\s+\w+)*?)\s+(?P<name>\w+)\s*\[\s*\]\s*;"
)
OPERAND = re.compile(r'\s*"(?P<constraint>[^"]+)"\s*\((?P<expression>.*)\)\s*$', re.DOTALL)
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
NAMESPACE = "::drope::emulation::"


def end_of_bracket(text: str, start: int) -> int:
    """Index of the partner of the bracket at `start`; strings are skipped."""
    depth, i = 0, start
    while i < len(text):
        if match := STRING.match(text, i):
            i = match.end()
            continue
        depth += (text[i] in OPENING) - (text[i] in CLOSING)
        if depth == 0:
            return i
        i += 1
    raise ValueError(f"unbalanced bracket: {text[start : start + 80]}")


def split_outside(text: str, separator: str) -> list[str]:
    """At separators that stand in no bracket and no string; `::` separates twice, as in asm."""
    parts, part, depth, i = [], "", 0, 0
    while i < len(text):
        if match := STRING.match(text, i):
            part += match.group()
            i = match.end()
            continue
        # A qualified name is no separator: two colons with something on both sides.
        if separator == ":" and re.match(r"\w::\w", text[max(0, i - 1) : i + 3]):
            part += "::"
            i += 2
            continue
        depth += (text[i] in OPENING) - (text[i] in CLOSING)
        if text[i] == separator and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += text[i]
        i += 1
    return [*parts, part]


def operand(text: str, is_output: bool) -> str:
    match = OPERAND.match(text)
    if match is None:
        raise ValueError(f"asm operand: {text}")
    kind = match["constraint"].lstrip("+=&")
    expression = match["expression"].strip()
    if kind == "n":
        return f"{NAMESPACE}asm_constant({expression})"
    if kind not in {"r", "l", "f", "h"}:
        raise ValueError(f"asm constraint: {match['constraint']}")
    function = "asm_output" if is_output else "asm_input"
    return f"{NAMESPACE}{function}<'{kind}'>({expression})"


def asm_call(body: str) -> str:
    """What stands between the brackets of an asm statement -> the call in its place."""
    template, *rest = split_outside(COMMENT.sub("", body), ":")
    if not template.strip().strip('"'):
        return "((void)0)"  # keeps the compiler from reordering: the emulator does not reorder
    outputs, inputs = ([*rest, "", ""])[:2]
    operands = [
        operand(part, is_output)
        for section, is_output in ((outputs, True), (inputs, False))
        for part in split_outside(section, ",")
        if part.strip()
    ]
    kind = f"{NAMESPACE}AsmSite"
    site = f"[]() -> {kind}& {{ static {kind} site{{{template.strip()}}}; return site; }}()"
    return f"{NAMESPACE}asm_statement({', '.join([site, *operands])})"


def asm_templates(text: str) -> list[str]:
    """The PTX of every asm statement, as the compiler sees it."""
    templates = []
    for match in ASM.finditer(text):
        body = COMMENT.sub("", text[match.end() : end_of_bracket(text, match.end() - 1)])
        pieces = STRING.findall(split_outside(body, ":")[0])
        templates.append("".join(ast.literal_eval(piece) for piece in pieces))
    return templates


def keep_lines(before: str, after: str) -> str:
    """As many line ends as before, so that compiler messages name the source's lines."""
    return after + "\n" * (before.count("\n") - after.count("\n"))


def rewrite_asm(text: str) -> str:
    result, at = "", 0
    while match := ASM.search(text, at):
        end = end_of_bracket(text, match.end() - 1)
        call = asm_call(text[match.end() : end])
        result += text[at : match.start()] + keep_lines(text[match.start() : end + 1], call)
        at = end + 1
    return result + text[at:]


def rewrite_shared(text: str) -> str:
    def pointer(match: re.Match[str]) -> str:
        kind = match["type"]
        memory = f"{NAMESPACE}dynamic_shared_memory()"
        return f"{kind}* {match['name']} = reinterpret_cast<{kind}*>({memory});"

    text = DYNAMIC_SHARED.sub(pointer, text)
    if "__shared__" in COMMENT.sub("", text):
        raise ValueError("static __shared__ variables are not emulated")
    return text


def rewrite_launches(text: str) -> str:
    while (start := text.find("<<<")) >= 0:
        statement = max(text.rfind(mark, 0, start) for mark in ";{}") + 1
        kernel = text[statement:start].strip()
        shape_end = text.index(">>>", start)
        shape = split_outside(text[start + 3 : shape_end], ",")
        if len(shape) not in {3, 4}:
            raise ValueError(f"launch of {kernel}: grid, block, shared bytes and perhaps a stream")
        arguments_end = end_of_bracket(text, text.index("(", shape_end))
        arguments = text[text.index("(", shape_end) + 1 : arguments_end]
        given = [kernel, *shape[:3], *([arguments] if arguments.strip() else [])]
        call = f"{NAMESPACE}launch({', '.join(part.strip() for part in given)})"
        before = text[statement : arguments_end + 1]
        text = text[:statement] + " " + keep_lines(before, call) + text[arguments_end + 1 :]
    return text


@functools.cache
def rewrite(text: str) -> str:
    """One CUDA source or header as C++."""
    return rewrite_launches(rewrite_shared(rewrite_asm(text)))
