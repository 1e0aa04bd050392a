"""Builds CUDA sources for the emulator and runs them.

Objects and libraries are kept under build/emulation, named by a digest of all that went into them.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from probes import probe

from .rewrite import rewrite

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CACHE = ROOT / "build" / "emulation"
HEADERS = (
    *sorted((ROOT / "csrc").glob("*.h")),
    *sorted((ROOT / "csrc/cuda").rglob("*.h")),
    *sorted((ROOT / "tests/probes/kernels").glob("*.h")),
    *sorted((FOLDER / "kernels").rglob("*.h")),
)
KERNELS = (
    *sorted((ROOT / "tests/probes/kernels").glob("*.cu")),
    *sorted((FOLDER / "kernels").glob("*.cu")),
)
RUNTIME = tuple(
    path
    for pattern in ("runtime/*.cpp", "runtime/*.S", "ptx/*.cpp")
    for path in sorted(FOLDER.glob(pattern))
)
RUNTIME_HEADERS = tuple(
    path for name in ("runtime", "ptx", "cuda") for path in sorted((FOLDER / name).glob("*.h"))
)

COMPILER = "g++"
COMMON = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", f"-I{FOLDER / 'cuda'}"]
RUNTIME_FLAGS = [*COMMON, "-O2", "-ftree-vectorize", "-march=native"]
HOST_FLAGS = [*COMMON, "-O1"]
# Instrumented, but not linked with ThreadSanitizer: runtime/access_hooks.cpp receives the calls.
KERNEL_FLAGS = [
    *COMMON,
    *("-x", "c++", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wno-unknown-pragmas", "-Wno-unused-parameter", "-fsanitize=thread"),
    *("-include", str(FOLDER / "cuda/kernel_language.h")),
]

AT_ISSUE, LATEST, RANDOM = range(3)
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)

Texts = Mapping[Path, str]  # of sources and headers of the repository
Job = tuple[Path, list[str], str]  # source, flags, digest of all that its object depends on


class EmulationError(RuntimeError):
    """A launch that failed, with the emulator's message."""


def digest(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode())
        total.update(b"\0")
    return total.hexdigest()[:24]


def unfinished_name(product: Path) -> Path:
    """Of this thread alone: planted builds run side by side and share most files."""
    return product.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")


@contextmanager
def alone_with(product: Path) -> Iterator[None]:
    """One thread of all processes at a time: who comes second finds the product made."""
    product.parent.mkdir(parents=True, exist_ok=True)
    with product.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


def run_compiler(arguments: list[str], product: Path) -> None:
    """Writes the product in one step, so that an interrupted build leaves nothing behind."""
    unfinished = unfinished_name(product)
    command = [COMPILER, *arguments, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    unfinished.replace(product)


@functools.cache
def cpu_features() -> str:
    """What -march=native means here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def compile_object(source: Path, flags: list[str], key: str) -> Path:
    product = CACHE / "objects" / f"{source.stem}-{key}.o"
    if not product.exists():
        with alone_with(product):
            if not product.exists():
                run_compiler([*flags, "-c", str(source)], product)
    return product


def compile_all(jobs: Iterable[Job]) -> list[Path]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda job: compile_object(*job), jobs))


def link(name: str, objects: Sequence[Path], libraries: Sequence[Path] = ()) -> Path:
    """Of two definitions of an inline function, the one in the first object counts."""
    library = CACHE / f"{name}-{digest(path.name for path in [*objects, *libraries])}.so"
    if not library.exists():
        with alone_with(library):
            if not library.exists():
                files = map(str, [*objects, *libraries])
                run_compiler(["-shared", "-Wl,-Bsymbolic", *files], library)
    return library


def read(paths: Iterable[Path]) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in paths}


def build_runtime() -> Path:
    key = digest([COMPILER, cpu_features(), *RUNTIME_FLAGS, *read(RUNTIME_HEADERS).values()])
    jobs = [(path, RUNTIME_FLAGS, digest([key, path.read_text()])) for path in RUNTIME]
    return link("runtime", compile_all(jobs))


# ---- rewritten sources -------------------------------------------------------------------------
def place(path: Path) -> Path:
    """Where a source stands in a rewritten tree: as in the repository; strangers by their name."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)


@functools.cache  # as is rewrite: builds of planted bugs share all files but one
def candidates(folder: Path, text: str) -> list[Path]:
    """Where the headers that a text in this folder includes may stand."""
    return [
        header
        for name in INCLUDE.findall(text)
        for header in ((folder / name).resolve(), ROOT / name, ROOT / "csrc" / name)
    ]


def included(source: Path, texts: Texts) -> set[Path]:
    """The headers of the repository that a source includes, directly or not."""
    found: set[Path] = set()
    unread = [source]
    while unread:
        path = unread.pop()
        for header in candidates(path.parent, texts[path]):
            if header in texts and header not in found:
                found.add(header)
                unread.append(header)
    return found


def write_tree(texts: Texts) -> Path:
    """Rewritten files in a tree of their own, at their places in the repository."""
    rewritten = {path: f'#line 1 "{path}"\n{rewrite(text)}' for path, text in texts.items()}
    tree = CACHE / "sources" / digest(rewritten.values())
    for path, text in rewritten.items():
        target = tree / place(path)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_name(target)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    return tree


def rewritten_jobs(sources: Sequence[Path], replaced: Texts, flags: list[str]) -> list[Job]:
    """`replaced`: text in place of that of a source or header."""
    texts = {**read([*HEADERS, *sources]), **replaced}
    tree = write_tree(texts)
    common = digest([COMPILER, cpu_features(), *flags, *read(RUNTIME_HEADERS).values()])
    jobs = []
    for source in sources:
        used = [source, *sorted(included(source, texts))]
        key = digest([common, *(texts[path] for path in used)])
        jobs.append((tree / place(source), [*flags, f"-I{tree / 'csrc'}"], key))
    return jobs


def build(replaced: Texts | None = None, sources: Sequence[Path] = KERNELS) -> Path:
    """The shared library of these kernels."""
    jobs = rewritten_jobs(sources, replaced or {}, KERNEL_FLAGS)
    return link("kernels", compile_all(jobs), [build_runtime()])


@dataclass(frozen=True)
class Emulator:
    """A built library. Its state is global: one launch at a time."""

    library: ctypes.CDLL

    @staticmethod
    def load(path: Path) -> Emulator:
        library = ctypes.CDLL(str(path))
        library.emulation_error.restype = ctypes.c_char_p
        library.emulation_event.restype = ctypes.c_char_p
        library.emulation_configure.argtypes = [ctypes.c_int, ctypes.c_uint64]
        library.emulation_set_device.restype = ctypes.c_bool
        library.emulation_lend.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        library.emulation_take_back.argtypes = [ctypes.c_void_p]
        return Emulator(library)

    def configure(self, completion: int, seed: int = 1) -> None:
        """completion: AT_ISSUE, LATEST or RANDOM. Resets the counts; the device is an H100."""
        self.library.emulation_configure(completion, seed)
        self.set_device((9, 0), num_sms=4, shared_bytes=232448)

    def set_device(self, capability: tuple[int, int], num_sms: int, shared_bytes: int) -> None:
        """shared_bytes: the most that one block may ask for."""
        assert self.library.emulation_set_device(*capability, num_sms, shared_bytes)

    def error(self) -> str:
        """What ended the last launch that failed."""
        return str(self.library.emulation_error().decode())

    def call(self, symbol: str, run: probe.Run) -> probe.Array:
        """One probe function; EmulationError when its launch fails."""
        try:
            return probe.call(self.library, symbol, run)
        except RuntimeError as error:
            raise EmulationError(f"{error} {self.error()}") from error

    def check(self, case: probe.Case) -> probe.Comparison:
        return probe.compare(case, [self.call(case.symbol, run) for run in case.runs])

    def counts(self) -> dict[str, int]:
        """Operations since configure(), by name."""
        result: dict[str, int] = {}
        count = ctypes.c_int64()
        while name := self.library.emulation_event(len(result), ctypes.byref(count)):
            result[name.decode()] = count.value
        return result
