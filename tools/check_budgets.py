"""The budgets of this repository, measured: `python tools/check_budgets.py [ROOT]`.

Prints one line per violation and exits 1 when there is any. Raising a budget needs a reason in the
commit that does it. A function's docstring does not count, as a comment above a C++ function does
not. A kernel is a function under csrc/, or one that Triton compiles, with forward, backward, decode
or kernel as one word of its snake_case name: it may be longer than other functions, and its
template parameters are counted.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cpp_functions import Function, find_functions, strip_comments

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
MAX_LINE_LENGTH = 100
MAX_KERNEL_TEMPLATE_PARAMETERS = 3
MAX_INSTANTIATION_FILES = 24
MAX_PUBLIC_NAMES = 16
MAX_ENVIRONMENT_VARIABLES = 4

# Where a function is one instruction.
ASM_PLACES = ("csrc/cuda/ptx/", "csrc/cpu/tiles/tile_amx.h")

PYTHON_SUFFIXES = {".py", ".pyi"}
CPP_SUFFIXES = {".h", ".hpp", ".cpp", ".cc", ".inc", ".cu", ".cuh"}
SHELL_SUFFIXES = {".sh"}
CODE_SUFFIXES = PYTHON_SUFFIXES | CPP_SUFFIXES | SHELL_SUFFIXES

KERNEL_NAME = re.compile(r"(?:^|_)(?:forward|backward|decode|kernel)(?:_|$)")
ARCHITECTURE_DIRECTIVE = re.compile(
    r"#\s*(?:if|ifdef|ifndef|elif)\b.*"
    r"(?:__CUDA_ARCH|__AVX|__SSE|__FMA__|__F16C__|__ARM|__aarch64__|__x86_64__)"
)
# A quoted DROPE_NAME is an environment variable; so is $ENV{DROPE_NAME}, and ${DROPE_NAME} in bash.
QUOTED_VARIABLE = re.compile(r"""["'](DROPE_[A-Z0-9_]+)["']""")
CMAKE_VARIABLE = re.compile(r"ENV\{(DROPE_[A-Z0-9_]+)\}")
SHELL_VARIABLE = re.compile(r"\$\{?(DROPE_[A-Z0-9_]+)")
# Written with classes of one character, so that this file does not match itself.
EXEMPTION = re.compile(
    r"fmt:\s*(?:[o]ff|[s]kip)|clang-format [o]ff|ruff:\s*n[o]qa|# *n[o]qa|NOLIN[T]"
)
EXEMPTING_KEYS = {
    *("exclude", "extend-exclude", "force-exclude"),
    *("per-file-ignores", "extend-per-file-ignores"),
}


@dataclass(frozen=True)
class Source:
    root: Path
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def at(self, line: int, message: str) -> str:
        return f"{self.name}:{line}: {message}"


def list_sources(root: Path) -> list[Source]:
    """Tracked and new files as git sees them; every file when root is no git checkout."""
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        paths = [root / name for name in listing.stdout.split("\0") if name]
    else:
        paths = list(root.rglob("*"))
    return [Source(root, path) for path in sorted(set(paths)) if path.is_file()]


def check_size(source: Source) -> Iterator[str]:
    lines = source.text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield source.at(1, f"file has {len(lines)} lines, at most {MAX_FILE_LINES}")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_LENGTH:
            yield source.at(number, f"line has {len(line)} characters, at most {MAX_LINE_LENGTH}")
        if EXEMPTION.search(line):
            yield source.at(number, "exempt from formatter or linter: fix the code instead")


def check_name(source: Source) -> Iterator[str]:
    if re.search(r"(?:^|_)utils?$", source.path.stem):
        yield source.at(1, "no file is named utils: name it after its theme")


def check_python(source: Source) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.text, source.name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = _last_line(node) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                num_lines -= _last_line(node.body[0]) - node.body[0].lineno + 1
            kind, limit = "function", MAX_FUNCTION_LINES
            if KERNEL_NAME.search(node.name) and any(map(_is_jit, node.decorator_list)):
                kind, limit = "kernel", MAX_KERNEL_LINES
            if num_lines > limit:
                message = f"{kind} {node.name} has {num_lines} lines, at most {limit}"
                yield source.at(node.lineno, message)
        elif isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
            yield source.at(node.lineno, "catches every exception: name the ones that can be met")


def _is_jit(decorator: ast.expr) -> bool:
    """Whether it is `triton.jit`, with arguments or without."""
    return ast.unparse(decorator).partition("(")[0] == "triton.jit"


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _catches_everything(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(map(_catches_everything, caught.elts))
    return caught is None or (
        isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException")
    )


def check_cpp(source: Source) -> Iterator[str]:
    code = strip_comments(source.text)
    in_csrc = source.name.startswith("csrc/")
    functions = list(find_functions(source.text))
    for function in functions:
        is_kernel = in_csrc and bool(KERNEL_NAME.search(function.name))
        yield from _check_function(source, function, is_kernel=is_kernel)
    for number, line in enumerate(code.splitlines(), 1):
        if re.search(r"\b(?:__)?asm(?:__)?\b", line) and not source.name.startswith(ASM_PLACES):
            yield source.at(number, f"asm outside {' and '.join(ASM_PLACES)}")
        inside = any(f.first_line <= number <= f.last_line for f in functions)
        # dispatch.cpp lists the architectures: that question is its whole task.
        asks_elsewhere = in_csrc and source.path.stem != "dispatch"
        if asks_elsewhere and inside and ARCHITECTURE_DIRECTIVE.search(line):
            yield source.at(number, "architecture #if inside a function: make it a file or a type")


def _check_function(source: Source, function: Function, *, is_kernel: bool) -> Iterator[str]:
    limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
    kind = "kernel" if is_kernel else "function"
    where, name = function.first_line, function.name
    if function.num_lines > limit:
        yield source.at(where, f"{kind} {name} has {function.num_lines} lines, at most {limit}")
    if is_kernel and function.num_template_parameters > MAX_KERNEL_TEMPLATE_PARAMETERS:
        yield source.at(
            where,
            f"kernel {name} has {function.num_template_parameters} template parameters, "
            f"at most {MAX_KERNEL_TEMPLATE_PARAMETERS}: gather them in a config type",
        )


def check_environment_variables(root: Path, sources: list[Source]) -> Iterator[str]:
    first_use: dict[str, str] = {}
    for source in sources:
        patterns = []
        if source.path.suffix in PYTHON_SUFFIXES | CPP_SUFFIXES:
            patterns.append(QUOTED_VARIABLE)
        elif source.path.suffix in SHELL_SUFFIXES or source.name in ("Makefile", ".ci/run"):
            patterns.append(SHELL_VARIABLE)
        elif source.path.name == "CMakeLists.txt" or source.path.suffix == ".cmake":
            patterns.append(CMAKE_VARIABLE)
        for name in chain.from_iterable(pattern.findall(source.text) for pattern in patterns):
            first_use.setdefault(name, source.name)
    if len(first_use) > MAX_ENVIRONMENT_VARIABLES:
        uses = ", ".join(f"{name} ({where})" for name, where in sorted(first_use.items()))
        yield f"{len(first_use)} environment variables, at most {MAX_ENVIRONMENT_VARIABLES}: {uses}"


def check_instantiations(root: Path, sources: list[Source]) -> Iterator[str]:
    count = sum("instantiations" in Path(source.name).parts for source in sources)
    if count > MAX_INSTANTIATION_FILES:
        yield f"csrc: {count} instantiation files, at most {MAX_INSTANTIATION_FILES}"


def check_public_names(root: Path, sources: list[Source]) -> Iterator[str]:
    package = root / "drope_kernels" / "__init__.py"
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            if len(names) > MAX_PUBLIC_NAMES:
                yield f"drope_kernels: {len(names)} public names, at most {MAX_PUBLIC_NAMES}"
            return
    yield "drope_kernels/__init__.py: no __all__, so its public names cannot be counted"


def check_tool_settings(root: Path, sources: list[Source]) -> Iterator[str]:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    ruff = settings.get("tool", {}).get("ruff", {})
    tables = {
        "ruff": ruff,
        "ruff.lint": ruff.get("lint", {}),
        "ruff.format": ruff.get("format", {}),
    }
    tables["mypy"] = settings.get("tool", {}).get("mypy", {})
    for name, table in tables.items():
        for key in sorted(set(table) & EXEMPTING_KEYS):
            yield f"pyproject.toml: tool.{name}.{key} exempts files: fix the code instead"
    for source in sources:
        if source.path.name == ".clang-format-ignore" or (
            source.path.name == ".clang-format" and "DisableFormat" in source.text
        ):
            yield source.at(1, "exempts files from clang-format")


RepositoryCheck = Callable[[Path, list[Source]], Iterator[str]]
REPOSITORY_CHECKS: tuple[RepositoryCheck, ...] = (
    check_environment_variables,
    check_instantiations,
    check_public_names,
    check_tool_settings,
)


def check_repository(root: Path) -> list[str]:
    sources = list_sources(root)
    violations: list[str] = []
    for source in sources:
        violations += check_name(source)
        if source.path.suffix in CODE_SUFFIXES:
            violations += check_size(source)
        if source.path.suffix in PYTHON_SUFFIXES:
            violations += check_python(source)
        elif source.path.suffix in CPP_SUFFIXES:
            violations += check_cpp(source)
    for check in REPOSITORY_CHECKS:
        violations += check(root, sources)
    return violations


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    violations = check_repository(root)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
