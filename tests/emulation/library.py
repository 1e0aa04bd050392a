"""Builds CUDA sources for the emulator and runs them.

Objects and libraries are kept under build/emulation, named by a digest of all that went into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu_check import probe

from .rewrite import rewrite

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CACHE = ROOT / "build" / "emulation"
HEADERS = (
    *sorted((ROOT / "csrc/cuda").rglob("*.h")),
    *sorted((ROOT / "tools/gpu_check/probes").glob("*.h")),
)
KERNELS = (
    *sorted((ROOT / "tools/gpu_check/probes").glob("*.cu")),
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
COMMON = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-fvisibility=default", "-Wall", "-Wextra"]
RUNTIME_FLAGS = [*COMMON, "-O2", "-ftree-vectorize", "-march=native", f"-I{FOLDER / 'cuda'}"]
# Instrumented, but not linked with ThreadSanitizer: runtime/access_hooks.cpp receives the calls.
KERNEL_FLAGS = [
    *COMMON,
    *("-x", "c++", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    "-fsanitize=thread",
    f"-I{FOLDER / 'cuda'}",
    *("-include", str(FOLDER / "cuda/kernel_language.h")),
]

AT_ISSUE, LATEST, RANDOM = range(3)


Job = tuple[Path, list[str], str]  # source, flags, digest of all that its object depends on


class EmulationError(RuntimeError):
    """A launch that failed, with the emulator's message."""


def digest(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode())
        total.update(b"\0")
    return total.hexdigest()[:24]


def run_compiler(arguments: list[str], product: Path) -> None:
    """Writes the product in one step, so that an interrupted build leaves nothing behind."""
    unfinished = product.with_suffix(f".{os.getpid()}.tmp")
    command = [COMPILER, *arguments, "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    unfinished.replace(product)


def cpu_features() -> str:
    """What -march=native means here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def compile_object(source: Path, flags: list[str], key: str) -> Path:
    product = CACHE / "objects" / f"{source.stem}-{key}.o"
    if not product.exists():
        product.parent.mkdir(parents=True, exist_ok=True)
        run_compiler([*flags, "-c", str(source)], product)
    return product


def texts(paths: Iterable[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in paths]


def write_rewritten(sources: Mapping[Path, str]) -> Path:
    """The rewritten files in a tree of their own, at their places in the repository."""
    tree = CACHE / "sources" / digest(sources.values())
    for path, text in sources.items():
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.tmp")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(target)
    return tree


def compile_all(jobs: Iterable[Job]) -> list[Path]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda job: compile_object(*job), jobs))


def link(name: str, objects: list[Path], libraries: Iterable[Path] = ()) -> Path:
    library = CACHE / f"{name}-{digest(path.name for path in [*objects, *libraries])}.so"
    if not library.exists():
        run_compiler(["-shared", "-Wl,-Bsymbolic", *map(str, [*objects, *libraries])], library)
    return library


def build_runtime() -> Path:
    key = digest([COMPILER, cpu_features(), *RUNTIME_FLAGS, *texts(RUNTIME_HEADERS)])
    jobs = [(path, RUNTIME_FLAGS, digest([key, path.read_text()])) for path in RUNTIME]
    return link("runtime", compile_all(jobs))


def kernel_jobs(replaced: Mapping[str, str]) -> list[Job]:
    headers = {path: rewrite(path.read_text()) for path in HEADERS}
    key = digest([COMPILER, *KERNEL_FLAGS, *texts(RUNTIME_HEADERS), *headers.values()])
    jobs = []
    for path in KERNELS:
        given = replaced.get(path.name, path.read_text())
        text = f'#line 1 "{path}"\n{rewrite(given)}'
        source = write_rewritten({**headers, path: text}) / path.relative_to(ROOT)
        jobs.append((source, KERNEL_FLAGS, digest([key, text])))
    return jobs


def build(replaced: Mapping[str, str] | None = None) -> Path:
    """The shared library of all kernels; `replaced`: file name of a kernel source -> its text."""
    return link("kernels", compile_all(kernel_jobs(replaced or {})), [build_runtime()])


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
        return Emulator(library)

    def configure(self, completion: int, seed: int = 1) -> None:
        """completion: AT_ISSUE, LATEST or RANDOM. Resets the counts."""
        self.library.emulation_configure(completion, seed)

    def call(self, symbol: str, run: probe.Run) -> probe.Array:
        """One probe function; EmulationError when its launch fails."""
        try:
            return probe.call(self.library, symbol, run)
        except RuntimeError as error:
            message = self.library.emulation_error().decode()
            raise EmulationError(message or str(error)) from error

    def check(self, case: probe.Case) -> probe.Comparison:
        return probe.compare(case, [self.call(case.symbol, run) for run in case.runs])

    def counts(self) -> dict[str, int]:
        """Operations since configure(), by name."""
        result: dict[str, int] = {}
        count = ctypes.c_int64()
        while name := self.library.emulation_event(len(result), ctypes.byref(count)):
            result[name.decode()] = count.value
        return result
