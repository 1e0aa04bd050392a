"""Runs lanes of stages, each in its own single-threaded process, and gathers what they send."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from drope_kernels.demo.config import DemoConfig
from drope_kernels.demo.corpus import Corpus
from drope_kernels.demo.plan import Measurement, Stage, Training
from drope_kernels.demo.stages import Workplace, fit, measure, sweep_data, train
from drope_kernels.evaluate import SweepRow

SEND_SECONDS = 0.1  # progress is sent no more often than this


@dataclass(frozen=True)
class StageStarted:
    title: str
    total: int  # steps or cells


@dataclass(frozen=True)
class StageAdvanced:
    title: str
    done: int  # since the last such message


@dataclass(frozen=True)
class StageFinished:
    title: str
    seconds: float
    result: SweepRow | dict[str, Any] | None  # a row, a temperature fit, or None for weights


Message = StageStarted | StageAdvanced | StageFinished


@dataclass
class Outcome:
    rows: dict[str, SweepRow] = field(default_factory=dict)
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, message: StageFinished) -> None:
        self.seconds[message.title] = message.seconds
        if isinstance(message.result, SweepRow):
            self.rows[message.title] = message.result
        elif message.result is not None:
            self.fits[message.title] = message.result


class LaneError(RuntimeError):
    """A lane's process ended before its work was done."""


def run_lanes(
    lanes: Sequence[Sequence[Stage]],
    config: DemoConfig,
    corpus: Corpus,
    folder: Path,
    on_message: Callable[[Message], None],
) -> Outcome:
    """Starts one process per lane and returns when all are done; none outlives this call.

    Spawned, not forked: the parent may hold threads, and a fork would copy their locks.
    """
    context = multiprocessing.get_context("spawn")
    torch.save(corpus, folder / "corpus.pt")
    processes: list[SpawnProcess] = []
    readers: list[Connection] = []
    try:
        for lane in lanes:
            reader, writer = context.Pipe(duplex=False)
            arguments = (list(lane), config, folder, writer)
            process = context.Process(target=lane_main, args=arguments, daemon=True)
            with _interrupts_blocked():  # inherited: Ctrl-C is the parent's to handle
                process.start()
            writer.close()  # the child holds the only one: its end is our end of file
            processes.append(process)
            readers.append(reader)
        return _gather(readers, processes, on_message)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gather(
    readers: list[Connection], processes: list[SpawnProcess], on_message: Callable[[Message], None]
) -> Outcome:
    outcome = Outcome()
    owner = dict(zip(readers, processes, strict=True))
    while owner:
        for reader in wait(list(owner)):
            assert isinstance(reader, Connection)
            try:
                message = reader.recv()
            except EOFError:
                process = owner.pop(reader)
                process.join()
                if process.exitcode != 0:
                    raise LaneError(
                        f"a worker process ended with exit code {process.exitcode} before its "
                        "stages were done; its own message is above"
                    ) from None
                continue
            if isinstance(message, StageFinished):
                outcome.add(message)
            on_message(message)
    return outcome


def lane_main(
    stages: Sequence[Stage], config: DemoConfig, folder: Path, writer: Connection
) -> None:
    """Body of a lane's process."""
    torch.set_num_threads(1)
    # The file is our parent's; a Corpus is a dataclass, which weights_only would refuse.
    corpus = torch.load(folder / "corpus.pt", weights_only=False)
    run_stages(stages, Workplace(config, corpus, folder), writer.send)


def run_stages(stages: Sequence[Stage], place: Workplace, send: Callable[[Message], None]) -> None:
    """Does the stages one after the other, reporting each through `send`."""
    data = sweep_data(place)
    for stage in stages:
        if isinstance(stage, Training):
            total = stage.steps
        elif isinstance(stage, Measurement):
            total = data.num_cells
        else:
            total = len(data.lengths) - 1
        send(StageStarted(stage.title, total))
        start = time.perf_counter()
        advance = _Advance(stage.title, send)
        result: SweepRow | dict[str, Any] | None = None
        if isinstance(stage, Training):
            train(stage, place, advance)
        elif isinstance(stage, Measurement):
            result = measure(stage, place, data, advance)
        else:
            result = fit(stage, place, advance)
        advance.flush()
        send(StageFinished(stage.title, time.perf_counter() - start, result))


class _Advance:
    """Counts finished steps and sends the count a few times a second."""

    def __init__(self, title: str, send: Callable[[Message], None]) -> None:
        self.title, self.send = title, send
        self.pending, self.sent_at = 0, time.perf_counter()

    def __call__(self, count: int) -> None:
        self.pending += count
        if time.perf_counter() - self.sent_at > SEND_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.send(StageAdvanced(self.title, self.pending))
        self.pending, self.sent_at = 0, time.perf_counter()
