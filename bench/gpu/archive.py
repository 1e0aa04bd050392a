"""The results of a visit as one tar, complete at any moment; and back into reports."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Archive:
    """A tar of a folder's JSON files, replaced in one step each time it is renewed.

    order: stages, most valuable first; where all of them are over `limit` bytes, the last stay
    out. What is no stage is worth most: it says what was left out.
    """

    def __init__(self, path: Path, folder: Path, order: Sequence[str], limit: int) -> None:
        self.path, self.folder, self.limit = path, folder, limit
        self.worth = {name: index for index, name in enumerate(order)}
        self.left_out: list[str] = []

    def renew(self) -> None:
        """Called after every stage: a visit that is cut off has lost nothing that ended before."""
        files = sorted(
            self.folder.glob("*.json"), key=lambda path: (self.worth.get(path.stem, -1), path.name)
        )
        partial = self.path.with_name(f"{self.path.name}.partial")
        self.left_out = []
        while True:
            with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
                for path in files:
                    add(tar, f"{self.folder.name}/{path.name}", path.read_bytes())
            if partial.stat().st_size <= self.limit or len(files) < 2:
                break
            self.left_out.insert(0, files.pop().stem)
        partial.replace(self.path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """As it was read at once: a stage may replace its file meanwhile with one of another size."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), int(time.time())
    tar.addfile(member, io.BytesIO(content))


def read_reports(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of a tar or a folder, by stage; ValueError where there are none."""
    if path.is_dir():
        texts = {one.stem: one.read_text() for one in sorted(path.glob("*.json"))}
    else:
        texts = read_tar(path)
    if not texts:
        raise ValueError(f"{path}: expected the results of tools/gpu_check.sh, found no JSON file")
    return {name: json.loads(text) for name, text in texts.items()}


def read_tar(path: Path) -> dict[str, str]:
    """In memory: nothing is unpacked."""
    texts = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member) if member.name.endswith(".json") else None
            if file is not None:
                texts[Path(member.name).stem] = file.read().decode()
    return dict(sorted(texts.items()))
