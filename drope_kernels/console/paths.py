"""Paths as users write them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """With `~` as the shell means it: it leaves it in `--out=~/run`, YAML and Python always do.

    Wherever a path enters, so that all that is done with it is done in one place.
    """
    written = Path(path)
    with contextlib.suppress(RuntimeError):  # ~nobody: a name as any other
        written = written.expanduser()
    return written
