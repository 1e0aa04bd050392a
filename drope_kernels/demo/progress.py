"""Progress of all lanes: a bar per started stage, and one for everything."""

from __future__ import annotations

from drope_kernels.console.progress import Bar, Progress
from drope_kernels.demo.lanes import Message, StageAdvanced, StageStarted
from drope_kernels.demo.plan import Measurement, Stage

INDENT = 34  # the longest description


class StageBars:
    """Shows the messages of lanes."""

    def __init__(self, stages: list[Stage], progress: Progress) -> None:
        self.progress = progress
        self.cost = {stage.title: stage.cost for stage in stages}
        self.descriptions = {stage.title: _description(stage) for stage in stages}
        self.everything = progress.bar("everything", total=sum(self.cost.values()))
        self.bars: dict[str, Bar] = {}

    def show(self, message: Message) -> None:
        description = self.descriptions[message.title]
        if isinstance(message, StageStarted):
            self.bars[message.title] = self.progress.bar(description, message.total)
            self.progress.line(f"{description} ...")
        elif isinstance(message, StageAdvanced):
            bar = self.bars[message.title]
            before = bar.share
            bar.add(message.done)
            self.everything.add((bar.share - before) * self.cost[message.title])
        else:
            self.progress.line(f"{description}: {message.seconds:.1f} s")


def _description(stage: Stage) -> str:
    return f"measure {stage.title}" if isinstance(stage, Measurement) else stage.title
