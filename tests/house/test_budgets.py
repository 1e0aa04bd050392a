"""Every budget of tools/check_budgets.py notices the violation that is planted for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

PUBLIC = "drope_kernels/__init__.py"


def check(root: Path) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tools" / "check_budgets.py"), str(root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.returncode, result.stdout


def plant(root: Path, files: dict[str, str]) -> None:
    clean = {
        PUBLIC: '__all__ = ["attention"]\n',
        "pyproject.toml": "[tool.ruff]\nline-length = 100\n",
    }
    for name, text in (clean | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def python_function(num_lines: int, docstring: str = "") -> str:
    return "def long():\n" + docstring + "    pass\n" * (num_lines - 1)


def cpp_function(num_lines: int, header: str = "void long_one(int a)") -> str:
    body = "  if (a) { a += '{'; }  // }\n" * (num_lines - 2)
    return f"namespace drope {{\n{header} {{\n{body}}}\n}}  // namespace drope\n"


VIOLATIONS: dict[str, tuple[dict[str, str], str]] = {
    "file": ({"a.py": "x = 1\n" * 401}, "a.py:1: file has 401 lines"),
    "line": ({"a.h": "//" + "x" * 99}, "a.h:1: line has 101 characters"),
    "python function": ({"a.py": python_function(61)}, "a.py:1: function long has 61 lines"),
    "Triton kernel": (
        {"a.py": "@triton.jit(debug=True)\n" + python_function(151).replace("long", "a_kernel")},
        "a.py:2: kernel a_kernel has 151 lines, at most 150",
    ),
    "Triton function": (
        {"a.py": "@triton.jit\n" + python_function(61)},
        "a.py:2: function long has 61 lines",
    ),
    "method": (
        {"a.py": "class A:\n" + "".join(f"  {x}\n" for x in python_function(61).splitlines())},
        "a.py:2: function long has 61 lines",
    ),
    "C++ function": ({"a.cpp": cpp_function(61)}, "a.cpp:2: function long_one has 61 lines"),
    "kernel outside csrc": (
        {"bench/a.cpp": cpp_function(61, "void forward_kernel(int a)")},
        "function forward_kernel has 61 lines",
    ),
    "kernel": (
        {"csrc/cpu/a.h": cpp_function(151, "template <class T>\nvoid attention_forward(int a)")},
        "kernel attention_forward has 152 lines, at most 150",
    ),
    "constructor": (
        {"a.h": cpp_function(61, "Tile(int a) : rows_(a), cols_{a}")},
        "function Tile has 61 lines",
    ),
    "operator": (
        {"a.h": "struct A {\n" + cpp_function(61, "void operator()(int a) const") + "};\n"},
        "function operator() has 61 lines",
    ),
    "template parameters": (
        {
            "csrc/a.h": "template <class A, class B = std::pair<int, int>, int C, int D>\n"
            "void decode_kernel() {}\n"
        },
        "kernel decode_kernel has 4 template parameters, at most 3",
    ),
    "instantiations": (
        {f"csrc/cuda/attention/instantiations/{i}.cu": "" for i in range(25)},
        "25 instantiation files, at most 24",
    ),
    "public names": (
        {PUBLIC: f"__all__ = {[f'name{i}' for i in range(17)]}\n"},
        "17 public names, at most 16",
    ),
    "no public names": ({PUBLIC: ""}, "no __all__"),
    "environment variables": (
        {
            "a.py": "".join(f'os.environ["DROPE" "_{i}"]\n' for i in "AB").replace('" "', "")
            + "NAME = 'DROPE' '_C'".replace("' '", ""),
            "csrc/a.cpp": 'auto d = getenv("DROPE' + '_D");\n',
            "CMakeLists.txt": "set(x $ENV{DROPE_" + "E})\n",
        },
        "5 environment variables, at most 4: DROPE_A (a.py)",
    ),
    "formatter": ({"a.py": "# fmt: " + "off\n"}, "a.py:1: exempt from formatter"),
    "C++ formatter": ({"a.h": "// clang-format " + "off\n"}, "a.h:1: exempt from formatter"),
    "linter": ({"a.py": "import os  # no" + "qa: F401\n"}, "a.py:1: exempt from formatter"),
    "ignored files": (
        {"pyproject.toml": '[tool.ruff.lint.per-file-ignores]\n"a.py" = ["E501"]\n'},
        "tool.ruff.lint.per-file-ignores exempts files",
    ),
    "excluded files": (
        {"pyproject.toml": '[tool.ruff]\nextend-exclude = ["a.py"]\n'},
        "tool.ruff.extend-exclude exempts files",
    ),
    "unformatted folder": ({"csrc/.clang-format": "DisableFormat: true\n"}, "exempts files"),
    "architecture": (
        {"csrc/a.h": "void f() {\n#ifdef __AVX2__\n  g();\n#endif\n}\n"},
        "csrc/a.h:2: architecture #if inside a function",
    ),
    "except Exception": (
        {"a.py": "try:\n  pass\nexcept (ValueError, Exception):\n  pass\n"},
        "a.py:3: catches every exception",
    ),
    "bare except": ({"a.py": "try:\n  pass\nexcept:\n  pass\n"}, "a.py:3: catches every exception"),
    "utils": ({"drope_kernels/utils.py": ""}, "no file is named utils"),
    "test utils": ({"tests/mask_utils.py": ""}, "no file is named utils"),
    "asm": ({"csrc/cuda/tile/a.cuh": 'void f() { asm volatile("x"); }\n'}, "asm outside"),
}

ALLOWED: dict[str, dict[str, str]] = {
    "nothing planted": {},
    "sixty lines": {"a.py": python_function(60), "a.cpp": cpp_function(60)},
    "docstrings do not count": {"a.py": python_function(60, '    """One.\n\n    Two.\n    """\n')},
    "a Triton kernel of 150 lines": {
        "a.py": "@triton.jit\n" + python_function(150).replace("long", "a_kernel")
    },
    "a kernel of 150 lines": {"csrc/a.h": cpp_function(150, "void backward_rows(int a)")},
    "asm of tiles": {"csrc/cpu/tiles/tile_amx.h": 'void f() { asm volatile("x"); }\n'},
    "asm in its place": {"csrc/cuda/ptx/wgmma.cuh": 'void f() { asm volatile("x"); }\n'},
    "words in comments": {"csrc/a.h": '// asm is elsewhere\nconst char* s = "asm {";\n'},
    "architecture at file level": {"csrc/a.h": "#ifdef __AVX2__\nvoid f() {}\n#endif\n"},
    "architecture in the dispatcher": {
        "csrc/cpu/dispatch.cpp": "void f() {\n#ifdef __x86_64__\n  g();\n#endif\n}\n"
    },
    "three template parameters": {
        "csrc/a.h": "template <class A, class B, int C>\nvoid decode_kernel() {}\n"
    },
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation_is_found(name: str, tmp_path: Path) -> None:
    files, message = VIOLATIONS[name]
    plant(tmp_path, files)
    status, printed = check(tmp_path)
    assert status == 1
    assert message in printed


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_passes(name: str, tmp_path: Path) -> None:
    plant(tmp_path, ALLOWED[name])
    assert check(tmp_path) == (0, "")
