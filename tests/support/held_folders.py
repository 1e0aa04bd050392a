"""A process that holds a folder and does nothing, until it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from drope_kernels.console.locks import alone_in


@contextlib.contextmanager
def held_by_another(folder: Path, lock: Path | None = None) -> Iterator[int]:
    """Its pid; in the end it is killed, so that it takes nothing away itself."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with alone_in(folder, argument="output_dir", lock=lock):
            os.write(writing, b"1")
            signal.pause()
        os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        yield pid
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
