"""A sweep as files: report.json with every number, report.md with every row, plots."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drope_kernels.evaluate.loss import MeanLoss
from drope_kernels.evaluate.needle import CaseScores, Proportion
from drope_kernels.evaluate.plots import PLOT_FILES, plot_files, write_plots
from drope_kernels.evaluate.sweep import SweepRow

REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"
REPORT_FILES = {REPORT_JSON, REPORT_MARKDOWN, *PLOT_FILES}


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Report:
    """What was run and what came out. `findings` are sentences made from the rows alone."""

    title: str
    train_length: int
    rows: Sequence[SweepRow]
    findings: Sequence[str]
    caveats: Sequence[str]  # what a reader must know before believing a number
    settings: dict[str, Any]  # plain data
    stage_seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # further plain data for report.json

    @property
    def lengths(self) -> list[int]:
        return sorted(self.rows[0].text_loss)


def machine() -> dict[str, Any]:
    """Kind of machine and versions; nothing that names this particular one."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def tables(report: Report) -> list[Table]:
    """Retrieval per task, then text loss and last-target loss: one column a length."""
    header = ["", *(_length_name(length, report) for length in report.lengths)]
    found = []
    for task in report.rows[0].retrieval:
        cells = [
            [row.name, *(_proportion(row, task, length) for length in report.lengths)]
            for row in report.rows
        ]
        counts = [report.rows[0].retrieval[task][length].trials for length in report.lengths]
        note = f"Exact match, 95 % Wilson interval; cases a cell: {', '.join(map(str, counts))}."
        found.append(Table(f"Retrieval, {task}", note, header, cells))
    first = report.rows[0]
    for title, what, losses in _loss_tables(first):
        cells = [
            [row.name, *(f"{losses(row)[length].mean:.3f}" for length in report.lengths)]
            for row in report.rows
        ]
        stderr = losses(first)[report.lengths[0]].stderr
        note = f"{what} Standard error of a cell about {stderr:.2f}, of a difference less."
        if math.isnan(stderr):
            note = f"{what} One window: no standard error."
        found.append(Table(title, note, header, cells))
    return found


def all_tables(report: Report) -> list[Table]:
    """Those of `tables`, of written needles where there are some, and loss by position."""
    return [
        *tables(report),
        *_share_tables(report),
        *_depth_tables(report),
        position_table(report),
    ]


def _share_tables(report: Report) -> list[Table]:
    """For tasks with several answers: how many of them were found, right or not as a whole."""
    header = ["", *(_length_name(length, report) for length in report.lengths)]
    found = []
    for task in report.rows[0].cases:
        if task in report.rows[0].tasks_with_depth:
            continue
        cells = [
            [row.name, *(f"{row.cases[task][x].mean_share:.2f}" for x in report.lengths)]
            for row in report.rows
        ]
        note = "Mean over cases of the share of wanted answers in what the model wrote."
        found.append(Table(f"Answers found, {task}", note, header, cells))
    return found


def _depth_tables(report: Report) -> list[Table]:
    """Exact match by depth of the asked needle, at every length."""
    found = []
    for task in report.rows[0].tasks_with_depth:
        columns = [
            (length, depth)
            for length in report.lengths
            for depth in report.rows[0].cases[task][length].by_depth()
        ]
        header = ["", *(f"{length} @ {depth:g}" for length, depth in columns)]
        cells = [
            [row.name, *(_count(row.cases[task][x].by_depth()[depth]) for x, depth in columns)]
            for row in report.rows
        ]
        note = "Right of all cases; a column is tokens @ depth of the asked needle, 1 at the end."
        found.append(Table(f"Retrieval by depth, {task}", note, header, cells))
    return found


def _count(score: Proportion) -> str:
    return f"{score.successes}/{score.trials}"


def position_table(report: Report) -> Table:
    """Loss by position at the greatest length, log-spaced buckets."""
    buckets = report.rows[0].by_position
    header = ["", *(f"{bucket.start}-{bucket.stop - 1}" for bucket in buckets)]
    cells = [
        [row.name, *(f"{bucket.loss.mean:.3f}" for bucket in row.by_position)]
        for row in report.rows
    ]
    note = f"Nats per token of the target at that position, windows of {report.lengths[-1]} tokens."
    return Table("Text loss by position", note, header, cells)


def to_json(report: Report) -> dict[str, Any]:
    """Plain data: settings, machine and every number of every row."""
    return {
        "title": report.title,
        "train_length": report.train_length,
        "lengths": report.lengths,
        "settings": report.settings,
        "machine": machine(),
        "stage_seconds": {name: round(s, 2) for name, s in report.stage_seconds.items()},
        "findings": list(report.findings),
        "caveats": list(report.caveats),
        "rows": [_row_json(row) for row in report.rows],
        **report.extra,
    }


def to_markdown(report: Report) -> str:
    lines = [f"# {report.title}", ""]
    lines += [f"- {sentence}" for sentence in report.findings]
    lines += ["", "## Read this with it", ""]
    lines += [f"- {sentence}" for sentence in report.caveats]
    for table in all_tables(report):
        lines += ["", f"## {table.title}", "", table.note, ""]
        lines += [_markdown_row(table.header), "|---" * len(table.header) + "|"]
        lines += [_markdown_row(row) for row in table.rows]
    lines += ["", "## Plots", ""]
    lines += [f"![{Path(name).stem}]({name})" for name in plot_files(report.rows)]
    lines += ["", "## How", ""]
    facts = {**report.settings, **machine()}
    lines += [f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in facts.items()]
    lines += ["", "| stage | seconds |", "|---|---|"]
    lines += [_markdown_row([name, f"{s:.1f}"]) for name, s in report.stage_seconds.items()]
    return "\n".join([*lines, ""])


def check_report_folder(folder: Path) -> None:
    """Raises unless `folder` can become a report: absent, empty, or an earlier report and no more.

    A report replaces the whole folder, so a file that no report wrote would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}; choose another name")
    others = {path.name for path in folder.iterdir()} - REPORT_FILES if folder.is_dir() else set()
    if others:
        raise ValueError(
            f"out: expected a new folder or an earlier report, got {folder} with other files "
            f"({min(others)}); choose another name"
        )
    parent = folder.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out: expected a writable parent folder, got {parent}; create it first")


def write_report(report: Report, folder: Path) -> None:
    """Writes all files beside `folder`, then renames: it holds a whole report or is untouched."""
    check_report_folder(folder)
    folder = folder.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workplace:
        fresh = Path(workplace) / "fresh"
        fresh.mkdir()
        text = json.dumps(to_json(report), indent=1, allow_nan=False)
        (fresh / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
        (fresh / REPORT_MARKDOWN).write_text(to_markdown(report), encoding="utf-8")
        write_plots(report.rows, report.train_length, fresh)
        replace_folder(fresh, folder)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Puts `fresh` in the place of `folder`; an existing one is set aside first, then removed."""
    if folder.exists():
        old = fresh.with_name("old")
        folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def _loss_tables(
    row: SweepRow,
) -> list[tuple[str, str, Callable[[SweepRow], dict[int, MeanLoss]]]]:
    targets = row.last_loss[min(row.last_loss)].num_targets
    return [
        (
            "Text loss",
            "Nats per token on held-out text; every length reads the same text, in pieces.",
            lambda r: r.text_loss,
        ),
        (
            "Text loss, same last targets",
            f"The same {targets} targets for every length: what more context changes.",
            lambda r: r.last_loss,
        ),
    ]


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _proportion(row: SweepRow, task: str, length: int) -> str:
    score = row.retrieval[task][length]
    low, high = score.interval()
    return f"{score.mean:.2f} [{low:.2f}-{high:.2f}]"


def _length_name(length: int, report: Report) -> str:
    return f"{length / report.train_length:g}x ({length})"


def _row_json(row: SweepRow) -> dict[str, Any]:
    retrieval = {
        task: {
            str(length): {
                **_score_json(score),
                **(_cases_json(row.cases[task][length]) if task in row.cases else {}),
            }
            for length, score in scores.items()
        }
        for task, scores in row.retrieval.items()
    }
    return {
        "name": row.name,
        "retrieval": retrieval,
        "text_loss": {str(length): _loss_json(loss) for length, loss in row.text_loss.items()},
        "last_loss": {str(length): _loss_json(loss) for length, loss in row.last_loss.items()},
        "by_position": [
            {"start": bucket.start, "stop": bucket.stop, **_loss_json(bucket.loss)}
            for bucket in row.by_position
        ],
    }


def _score_json(score: Proportion) -> dict[str, Any]:
    return {
        "right": score.successes,
        "cases": score.trials,
        "wilson95": [round(bound, 4) for bound in score.interval()],
    }


def _cases_json(cases: CaseScores) -> dict[str, Any]:
    return {
        "share_found": round(cases.mean_share, 4),
        "by_depth": {f"{depth:g}": _score_json(x) for depth, x in cases.by_depth().items()},
        "by_seed": {str(seed): _score_json(x) for seed, x in cases.by_seed().items()},
    }


def _loss_json(loss: MeanLoss) -> dict[str, Any]:
    """Numbers that are not finite as null: JSON has none."""
    return {
        "mean": round(loss.mean, 5) if math.isfinite(loss.mean) else None,
        "stderr": round(loss.stderr, 5) if math.isfinite(loss.stderr) else None,
        "num_targets": loss.num_targets,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
