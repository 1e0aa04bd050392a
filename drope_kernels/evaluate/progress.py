"""Progress of an evaluation: a bar with time left on a terminal, a line for each row elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class EvaluationProgress:
    """Counts the tokens that models have read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bars.add_task("", total=None)
        self.total = self.done = 0
        self.begun = 0.0
        self.title = ""

    def __enter__(self) -> EvaluationProgress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.bars.update(self.task, description=text)
        if not self.console.is_terminal:
            self.console.print(f"{text} ...", highlight=False, markup=False)

    def begin(self, total: int) -> None:
        self.total, self.begun = total, time.perf_counter()
        self.bars.update(self.task, total=total)

    def advance(self, title: str, num_tokens: int) -> None:
        self.done += num_tokens
        self.bars.update(self.task, description=title, advance=num_tokens)
        if title != self.title and not self.console.is_terminal:
            self.console.print(f"{title} ... {self._left()}", highlight=False, markup=False)
        self.title = title

    def _left(self) -> str:
        """Longer inputs take longer for each token: an estimate."""
        share = self.done / self.total
        left = (time.perf_counter() - self.begun) * (1 - share) / share
        return f"{100 * share:.0f} %, about {max(0.0, left):.0f} s left"
