"""Progress of all lanes: bars with time left on a terminal, one line a stage elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from drope_kernels.demo.lanes import Message, StageAdvanced, StageStarted
from drope_kernels.demo.plan import Measurement, Stage


class DemoProgress:
    """A bar per started stage, and one for everything."""

    def __init__(self, stages: list[Stage], console: Console) -> None:
        self.console = console
        self.cost = {stage.title: stage.cost for stage in stages}
        self.descriptions = {stage.title: _description(stage) for stage in stages}
        self.bars = Progress(
            TextColumn("{task.description:<33}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.everything = self.bars.add_task("everything", total=sum(self.cost.values()))
        self.tasks: dict[str, TaskID] = {}
        self.totals: dict[str, int] = {}

    def __enter__(self) -> DemoProgress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def show(self, message: Message) -> None:
        if isinstance(message, StageStarted):
            self.totals[message.title] = message.total
            self.tasks[message.title] = self.bars.add_task(
                self.descriptions[message.title], total=message.total
            )
            if not self.console.is_terminal:
                self.console.print(f"{self.descriptions[message.title]} ...")
        elif isinstance(message, StageAdvanced):
            self.bars.advance(self.tasks[message.title], message.done)
            share = message.done / self.totals[message.title]
            self.bars.advance(self.everything, share * self.cost[message.title])
        elif not self.console.is_terminal:
            self.console.print(f"{self.descriptions[message.title]}: {message.seconds:.1f} s")


def _description(stage: Stage) -> str:
    return f"measure {stage.title}" if isinstance(stage, Measurement) else stage.title
