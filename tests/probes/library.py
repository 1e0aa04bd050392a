"""The probes as one shared library: kept from before or carried here, else compiled by nvcc now.

Beside the library lies what the compiler said of it, so that nothing has to be compiled twice.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repository import ROOT

from bench import machine
from probes.nvcc import Compilation, compile_all, link, sass_counts
from probes.sources import SOURCES

PROBES = Path(__file__).parent / "kernels"
FOLDER = ROOT / "build" / "gpu_check_probes"  # git ignores it
LIBRARY, FACTS = "libdrope_probes.so", "probes.json"
BUILT_FROM = (
    *("csrc/cuda/ptx", "tests/probes/kernels"),
    *("tests/probes/nvcc.py", "tests/probes/sources.py"),
)
LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
LOAD_SECONDS = 30.0


@dataclass(frozen=True)
class ProbeLibrary:
    """facts: "sources", "compilations", "complaints" and "sass" of the library at `path`."""

    path: Path
    facts: dict[str, Any]

    @property
    def complaints(self) -> list[str]:
        return list(self.facts["complaints"])

    @property
    def num_kernels(self) -> int:
        return sum(len(one["kernels"]) for one in self.facts["compilations"])


class ProbesDoNotCompileError(Exception):
    """facts: what nvcc said, as in ProbeLibrary."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__("the probes do not compile")
        self.facts = facts


def digest() -> str:
    return machine.source_digest(ROOT, BUILT_FROM)


def find(folder: Path) -> ProbeLibrary | None:
    """That of the sources as they are; None where the folder has none, or one of other sources."""
    path, facts = folder / LIBRARY, folder / FACTS
    if not path.exists() or not facts.exists():
        return None
    found = json.loads(facts.read_text())
    return ProbeLibrary(path, found) if found["sources"] == digest() else None


def why_not_loaded(path: Path) -> str:
    """Empty when a process of this machine loads the library."""
    command = [sys.executable, "-c", LOAD, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"loading it took more than {LOAD_SECONDS:.0f} s"
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def facts_of(compilations: list[Compilation]) -> dict[str, Any]:
    return {
        "sources": digest(),
        "compilations": [
            {
                "source": one.source,
                "seconds": one.seconds,
                "kernels": [asdict(kernel) for kernel in one.kernels],
                "complaints": one.complaints,
            }
            for one in compilations
        ],
        "complaints": [text for one in compilations for text in one.complaints],
        "sass": None,
    }


def make(nvcc: str, folder: Path) -> ProbeLibrary:
    """Compiles the library into `folder`, complete or not at all."""
    with tempfile.TemporaryDirectory(prefix="drope_probes_") as temporary:
        work = Path(temporary)
        jobs = min(len(SOURCES), os.cpu_count() or 1)
        compilations = compile_all(nvcc, PROBES, SOURCES, work, jobs)
        facts = facts_of(compilations)
        if any(one.returncode for one in compilations):
            raise ProbesDoNotCompileError(facts)
        library = link(nvcc, SOURCES, work)
        facts["sass"] = sass_counts(library)
        (work / FACTS).write_text(json.dumps(facts))
        take(work, folder)
    return ProbeLibrary(folder / LIBRARY, facts)


def take(source: Path, folder: Path) -> None:
    """Library, then facts: whoever finds the facts finds the library they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LIBRARY, FACTS):
        partial = folder / f"{name}.{os.getpid()}.partial"
        shutil.copyfile(source / name, partial)
        partial.replace(folder / name)
