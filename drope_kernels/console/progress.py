"""Progress of long work: bars with time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import ProgressColumn, Task
from rich.text import Text

WIDEST_BAR, NARROWEST_BAR = 40, 8  # characters


class Progress:
    """What a command tells of its work.

    Args:
        console: where it goes; its bars are drawn only on a terminal.
        indent: characters before the numbers, at least, so that several bars are in line.
    """

    def __init__(self, console: Console, indent: int = 0) -> None:
        self.console = console
        self.has_bars = console.is_terminal
        self._rows = RichProgress(
            _Row(console, indent),
            console=console,
            disable=not self.has_bars,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a file stays out of the terminal
        )

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Draw, until `close`."""
        self._rows.start()

    def close(self) -> None:
        """Leave the bars as they stand, also after an interrupt."""
        if self.has_bars:
            self._rows.stop()

    def bar(self, description: str = "", total: float | None = None, done: float = 0) -> Bar:
        """Another piece of work, `done` of it in an earlier process; total None: not known yet."""
        bar = Bar(self, description, total, done)
        self._rows.add_task("", bar=bar)
        return bar

    def write(self, text: str) -> None:
        """A line that stays, above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """A line where there are no bars."""
        if not self.has_bars:
            self.write(text)


class Bar:
    """One piece of work: how much of it is done, and how long the rest may take."""

    def __init__(
        self, progress: Progress, description: str, total: float | None, done: float
    ) -> None:
        self.progress, self.description = progress, description
        self.note = ""  # behind the times
        self.begin(total, done)

    def begin(self, total: float | None, done: float = 0) -> None:
        """Count, and time, from here."""
        self.total, self.done, self.first = total, done, done
        self._begun, self._ended = time.perf_counter(), 0.0

    def say(self, description: str) -> None:
        """What is done now; a line of its own elsewhere than on a terminal."""
        self.description = description
        self.progress.line(f"{description} ...")

    def advance(self, description: str, amount: float) -> None:
        """`amount` of work done on what `description` says: a line when that is something new."""
        self.add(amount)
        if description != self.description:
            self.description = description
            told = f"{100 * self.share:.0f} %, about {self.left():.0f} s left"
            self.progress.line(f"{description} ... {told}")

    def add(self, amount: float) -> None:
        self.done += amount
        if self.total is not None and self.done >= self.total:
            self._ended = time.perf_counter()

    @property
    def share(self) -> float:
        """What part of the total is done, in [0, 1]; 0 while there is no total."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def elapsed(self) -> float:
        """Seconds from the beginning to now, or to the end."""
        return (self._ended or time.perf_counter()) - self._begun

    def left(self) -> float:
        """Seconds, if the rest goes as fast as what was done here: an estimate."""
        done_here = self.done - self.first
        if self.total is None or done_here <= 0:
            return 0.0
        return max(0.0, self.elapsed() * (self.total - self.done) / done_here)


class _Row(ProgressColumn):
    """`what:  40% ━━━━────── 4/10 [00:03<00:05, note]`, cut at the edge of the terminal."""

    def __init__(self, console: Console, indent: int) -> None:
        super().__init__()
        self.console, self.indent = console, indent

    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        if bar.total is None:
            return _cut(Text(f"{bar.description} [{clock(bar.elapsed())}]"))
        left = clock(bar.left()) if bar.done > bar.first else "?"
        note = f", {bar.note}" if bar.note else ""
        head = f"{bar.description + ':':<{self.indent}} {bar.share:4.0%} "
        tail = f" {bar.done:,.0f}/{bar.total:,.0f} [{clock(bar.elapsed())}<{left}{note}]"
        room = self.console.width - len(head) - len(tail)
        width = max(NARROWEST_BAR, min(WIDEST_BAR, room))
        full, empty = "━─" if self.console.encoding.startswith("utf") else "#-"
        filled = round(width * bar.share)
        styled = ((full * filled, "bar.complete"), (empty * (width - filled), "bar.back"))
        return _cut(Text.assemble(head, *styled, tail))


def _cut(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"  # an ellipsis is no ASCII
    return text


def clock(seconds: float) -> str:
    """03:07, from an hour on 1:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
