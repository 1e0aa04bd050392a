"""What a run writes down beside its checkpoints, one JSON line a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class StepRecords:
    """A .jsonl file of measurements at steps.

    A resumed run repeats the steps after its checkpoint: `begin` takes out what was written of
    them, so that every step stands in the file once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keeps the records up to this step."""
        kept = [record for record in self.read() if record["step"] <= step]
        if self.path.exists():
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)

    def append(self, step: int, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that a killed process left unfinished is none."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]
