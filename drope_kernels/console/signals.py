"""SIGTERM, as schedulers send it, as an exception: what is open is closed, then it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_raises(error: BaseException) -> Iterator[None]:
    """Inside, SIGTERM raises `error` in the main thread; elsewhere it does what it did."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        raise error

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
