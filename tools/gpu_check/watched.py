"""Runs device.target under a tool of the CUDA toolkit that watches or profiles a process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from device import DONE

from bench.machine import ROOT, find_nvcc
from gpu_check import installed
from gpu_check.report import python_path

LOG_CHARACTERS = 6000


@dataclass(frozen=True)
class Watched:
    """returncode None: stopped when its time was up. completed: the calls themselves all ran."""

    returncode: int | None
    log: str

    @property
    def completed(self) -> bool:
        return DONE in self.log

    @property
    def log_end(self) -> str:
        return self.log[-LOG_CHARACTERS:]


def find_tool(name: str) -> str | None:
    """On PATH, or beside nvcc."""
    nvcc = find_nvcc()
    beside = Path(nvcc).parent / name if nvcc is not None else None
    if shutil.which(name) is None and beside is not None and beside.exists():
        return str(beside)
    return shutil.which(name)


def watch(
    prefix: list[str],
    package: Path,
    targets: tuple[str, ...],
    *,
    dry_run: bool,
    seconds: float,
    backend: str = "cuda",
) -> Watched:
    """The targets on the GPU under `prefix`; in a dry run on the CPU, under nothing."""
    where = ["cpu", "reference"] if dry_run else ["cuda", backend]
    command = [*([] if dry_run else prefix), sys.executable, "-m", "device.target", *where]
    # Every tensor an allocation of its own: a read behind its end is then seen as one.
    environment = os.environ | {
        "PYTHONPATH": python_path(package),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    environment["TRITON_CACHE_DIR"] = str(installed.TRITON_CACHE)
    if dry_run:
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [*command, *targets],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT / "tools",  # see worker.py
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        log.seek(0)
        return Watched(code, log.read())
