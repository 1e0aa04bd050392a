"""One command at a time writes a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

INSIDE = ".lock"  # the file of a folder that is filled over hours
_held: set[tuple[int, Path]] = set()  # processes, because a fork inherits this set


def lock_beside(folder: Path) -> Path:
    """The file of a folder that is replaced as a whole."""
    folder = folder.resolve()
    return folder.with_name(f"{INSIDE}-{folder.name}")


@contextlib.contextmanager
def alone_in(folder: Path, *, argument: str, lock: Path | None = None) -> Iterator[None]:
    """Inside, no other process gets here with this folder; the same one may, again.

    The system takes the lock back when the process ends, however it ends: a file that a killed one
    left holds nobody up. Without folder, it is made, and taken away again if it stays empty.

    Args:
        folder: that is written to.
        argument: how the user calls it.
        lock: the file, by default INSIDE the folder.

    Raises:
        ValueError: another process holds it; which one, and since when.
        OSError: the file cannot be written or locked.
    """
    path = (folder / INSIDE if lock is None else lock).resolve()
    mine = (os.getpid(), path)
    if mine in _held:
        yield
        return
    made = [part for part in (path.parent, *path.parent.parents) if not part.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked(path, folder, argument)
        _held.add(mine)
        try:
            yield
        finally:
            _held.discard(mine)
            path.unlink(missing_ok=True)
            file.close()
    finally:
        with contextlib.suppress(OSError):  # not empty: it is wanted
            for part in made:
                part.rmdir()


def _locked(path: Path, folder: Path, argument: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")  # for writing, or NFS would refuse to lock it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise ValueError(_in_use(file, folder, argument)) from None
        except OSError as error:
            file.close()
            raise OSError(
                error.errno,
                f"{path}: cannot be locked ({error.strerror}); choose an {argument} on a file "
                "system that has locks",
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return _signed(file)
        file.close()  # the process before has taken it away


def _signed(file: IO[str]) -> IO[str]:
    """Says who holds it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    file.flush()
    return file


def _in_use(file: IO[str], folder: Path, argument: str) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except ValueError:  # not written yet
        who = "a process that has just begun"
    return (
        f"{argument}: expected a folder that no other command writes to, got {folder}, which is "
        f"held by {who}; wait until that ends, stop it, or choose another {argument}"
    )
