"""Jobs in a process of their own: a kernel that crashes or hangs costs one job, not the stage.

The child, `python -m gpu_check.worker MODULE MODE`, imports MODULE and answers each line
of its input, a job's name, with one line: what MODULE.run_job(name, accelerator) returned.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from bench.gpu.failures import CALL_ERRORS
from bench.machine import ROOT
from gpu_check import installed
from gpu_check.report import python_path

START_SECONDS = 120.0  # torch, the package and the CUDA context, from a cold disk
ERROR_CHARACTERS = 1500


# ---- the child


def answer(module: Any, name: str, where: Any) -> dict[str, Any]:
    """The job's result or {"error": ...}; "lost": the device no longer answers after it."""
    try:
        result: dict[str, Any] = module.run_job(name, where)
    except CALL_ERRORS as error:
        result = {"error": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]}
    try:
        where.settle()
    except RuntimeError as error:
        result.setdefault("error", f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS])
        result["lost"] = True
    return result


def serve(module_name: str, mode: str, jobs: TextIO, answers: TextIO) -> None:
    from bench.gpu.accelerator import accelerator

    module = importlib.import_module(module_name)
    try:
        where = accelerator(mode == "dry-run")
        hello: dict[str, Any] = {"ready": True}
    except CALL_ERRORS as error:
        hello = {"error": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS], "lost": True}
    print(json.dumps(hello), file=answers, flush=True)
    if "lost" in hello:
        return
    for line in jobs:
        result = answer(module, line.rstrip("\n"), where)
        print(json.dumps(result), file=answers, flush=True)
        if "lost" in result:
            return


# ---- the parent


class Worker:
    """Starts the child when it is first asked, and again after it was lost.

    num_beside: workers that run at a time and share the machine's cores.
    """

    def __init__(
        self, module: str, mode: str, package: Path | None = None, num_beside: int = 1
    ) -> None:
        self.command = [sys.executable, "-m", "gpu_check.worker", module, mode]
        inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([python_path(package or ROOT), *inherited]),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch asks for it in deterministic mode
            "TRITON_CACHE_DIR": str(installed.TRITON_CACHE),
        }
        if mode == "dry-run" or num_beside > 1:
            num_threads = 1 if mode == "dry-run" else max(1, (os.cpu_count() or 1) // num_beside)
            self.environment["OMP_NUM_THREADS"] = str(num_threads)
        self.process: subprocess.Popen[str] | None = None
        self.errors = -1  # the file, already without a name, that takes the child's error stream
        self.failed_starts = 0
        self.last_failure: dict[str, Any] = {}

    def ask(self, job: str, seconds: float) -> dict[str, Any]:
        """The job's answer; {"error": ...} when it crashes or says nothing for so long."""
        if self.process is None:
            if self.failed_starts == 2:  # it would fail at every job, seconds each
                return dict(self.last_failure)
            hello = self.start()
            if "error" in hello:
                self.failed_starts += 1
                self.last_failure = hello
                return dict(hello)
            self.failed_starts = 0
        process = self.process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(job + "\n")
        process.stdin.flush()
        return self.read(seconds)

    def start(self) -> dict[str, Any]:
        self.errors, name = tempfile.mkstemp()
        Path(name).unlink()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=self.environment,
            cwd=ROOT / "tools",  # -m puts it on the path: the root holds a package without kernels
            start_new_session=True,
        )
        return self.read(START_SECONDS)

    def read(self, seconds: float) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        started = time.time()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(seconds) else None
        if line is None:
            self.close()
            return {"error": f"no answer within {seconds:.0f} s: stopped", "hung": True}
        if not line:
            code = process.wait()
            skipped = max(0, os.fstat(self.errors).st_size - ERROR_CHARACTERS)
            last = os.pread(self.errors, ERROR_CHARACTERS, skipped).decode(errors="replace")
            self.close()
            return {"error": f"the process ended with status {code}: {last.strip()}"}
        result: dict[str, Any] = json.loads(line)
        result["seconds"] = round(time.time() - started, 2)
        if "lost" in result:
            self.close()
        return result

    def close(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        os.close(self.errors)
        self.process = None


def end_with(stage: int) -> None:
    """Ends the child and what it started when the stage was killed: its job would run on into the
    times of the next one."""
    while os.getppid() == stage:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    module, mode = sys.argv[1:]
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the error text, not among the answers
    serve(module, mode, sys.stdin, answers)


if __name__ == "__main__":
    main()
