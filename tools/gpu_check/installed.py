"""Where the GPU machine keeps the built package, and whether it is of the sources as they are."""

from __future__ import annotations

import shutil
import sys

from bench import machine
from bench.machine import ROOT

FOLDER = ROOT / "build" / "gpu_check"  # git ignores it; later calls on the same machine find it
STAMP = FOLDER / "sources.txt"
# Triton knows a compiled kernel by its source and the compiler's: what is stale is not found.
TRITON_CACHE = ROOT / "build" / "gpu_check_triton"
BUILT_FROM = (
    *("cmake", "csrc", "drope_kernels", "python_bindings"),
    *("CMakeLists.txt", "setup.py", "pyproject.toml"),
)


def identity() -> str:
    """Of the sources and of the Python that can import what was built of them."""
    return f"{machine.source_digest(ROOT, BUILT_FROM)} {sys.implementation.cache_tag}"


def is_current() -> bool:
    return STAMP.exists() and STAMP.read_text() == identity()


def of_the_tree() -> bool:
    """Whether the tree itself holds a module for this Python; of which sources, it does not say."""
    pattern = f"_C.{sys.implementation.cache_tag}*.so"
    return any((ROOT / "drope_kernels").glob(pattern))


def clear() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


def mark() -> None:
    """Says that what is in FOLDER was built from the present sources and works."""
    STAMP.write_text(identity())
