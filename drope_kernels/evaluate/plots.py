"""The plots of a report: retrieval by length and by depth, text loss by length and by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError as error:
    raise ImportError(
        f"drope_kernels.evaluate.report draws plots, and {error.name} is missing: "
        "pip install 'drope_kernels[eval]'"
    ) from error

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt
from matplotlib.transforms import ScaledTranslation

from drope_kernels.evaluate.sweep import SweepRow

RETRIEVAL, DEPTH = "retrieval.png", "retrieval_by_depth.png"
TEXT_LOSS, BY_POSITION = "text_loss.png", "loss_by_position.png"
PLOT_FILES = (RETRIEVAL, DEPTH, TEXT_LOSS, BY_POSITION)
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "os^vDPX<>ph*"
MARKER_SIZE = 5  # points
WIDEST = 60  # points over which the rows of one place are spread
MARGIN = 0.12  # of the axis, at either end, for them


def plot_files(rows: Sequence[SweepRow]) -> list[str]:
    """Those of PLOT_FILES that these rows have numbers for."""
    absent = set() if rows[0].retrieval else {RETRIEVAL}
    if not rows[0].tasks_with_depth:
        absent.add(DEPTH)
    return [name for name in PLOT_FILES if name not in absent]


def write_plots(rows: Sequence[SweepRow], train_length: int, folder: Path) -> None:
    """Writes `plot_files` into `folder`."""
    draw = {
        RETRIEVAL: _plot_retrieval,
        DEPTH: _plot_by_depth,
        TEXT_LOSS: _plot_text_loss,
        BY_POSITION: _plot_by_position,
    }
    for name in plot_files(rows):
        draw[name](rows, train_length, folder / name)


def _plot_retrieval(rows: Sequence[SweepRow], train_length: int, path: Path) -> None:
    tasks = list(rows[0].retrieval)
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(5.5 * len(tasks) + 2.5, 4.5), squeeze=False, sharey=True
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        for index, row in enumerate(rows):
            scores = row.retrieval[task]
            lengths = sorted(scores)
            means = [scores[length].mean for length in lengths]
            bounds = [scores[length].interval() for length in lengths]
            below = [mean - low for mean, (low, _) in zip(means, bounds, strict=True)]
            above = [high - mean for mean, (_, high) in zip(means, bounds, strict=True)]
            _draw(axes, lengths, means, row.name, (index, len(rows)), errors=[below, above])
        _length_axis(axes, rows, train_length)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(f"retrieval, {task} (95 % Wilson)")
    panels[0][0].set_ylabel("exact match")
    _save(figure, panels[0][-1], path)


def _plot_by_depth(rows: Sequence[SweepRow], train_length: int, path: Path) -> None:
    """A panel for each task and row: depth downwards, length to the right."""
    tasks = rows[0].tasks_with_depth
    lengths = sorted(rows[0].text_loss)
    figure, panels = plt.subplots(
        len(rows), len(tasks), figsize=(3.2 * len(tasks), 1.9 * len(rows)), squeeze=False
    )
    for row, line in zip(rows, panels, strict=True):
        for task, axes in zip(tasks, line, strict=True):
            scores = [row.cases[task][length].by_depth() for length in lengths]
            depths = list(scores[0])
            shares = [[score[depth].mean for score in scores] for depth in depths]
            axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=6)
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=6)
            axes.set_title(f"{row.name}\n{task}", fontsize=6)
    figure.supxlabel(f"tokens (training length {train_length}); bright: all right", fontsize=7)
    figure.supylabel("depth of the asked needle", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_text_loss(rows: Sequence[SweepRow], train_length: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for index, row in enumerate(rows):
        lengths = sorted(row.text_loss)
        means = [row.text_loss[length].mean for length in lengths]
        _draw(axes, lengths, means, row.name, (index, len(rows)))
    _length_axis(axes, rows, train_length)
    axes.set_ylabel("nats per token")
    axes.set_title("held-out text, the same text at every length")
    _save(figure, axes, path)


def _plot_by_position(rows: Sequence[SweepRow], train_length: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for index, row in enumerate(rows):
        middles = [(bucket.start * bucket.stop) ** 0.5 for bucket in row.by_position]
        means = [bucket.loss.mean for bucket in row.by_position]
        _draw(axes, middles, means, row.name, (index, len(rows)))
    buckets = rows[0].by_position
    _log_axis(axes, buckets[0].start, buckets[-1].stop)
    axes.axvline(train_length, color="0.6", linewidth=1)
    axes.set_xlabel("position of the target (grey line: training length)")
    axes.set_ylabel("nats per token")
    axes.set_title("held-out text loss by position")
    _save(figure, axes, path)


def _length_axis(axes: Any, rows: Sequence[SweepRow], train_length: int) -> None:
    lengths = sorted(rows[0].text_loss)
    _log_axis(axes, lengths[0], lengths[-1])
    axes.set_xticks(lengths, [f"{length}\n{length / train_length:g}x" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens / training length")


def _log_axis(axes: Any, least: float, greatest: float) -> None:
    """Of lengths or positions, with room for rows that are shifted, which limits do not follow."""
    axes.set_xscale("log", base=2)
    axes.update_datalim([point for line in axes.lines for point in line.get_xydata()])
    axes.autoscale_view(scalex=False)
    margin = max(2.0**0.5, (greatest / least) ** MARGIN)
    axes.set_xlim(least / margin, greatest * margin)


def _draw(
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    name: str,
    place: tuple[int, int],  # of the row, and number of rows
    errors: Sequence[Sequence[float]] | None = None,
) -> None:
    """A row beside the others, so that equal ones can be told: its markers above all lines.

    They are apart in points of the page, not in what the axis counts.
    """
    index, num_rows = place
    colours = matplotlib.color_sequences["tab10"]
    colour, marker = colours[index % len(colours)], MARKERS[index % len(MARKERS)]
    step = min(MARKER_SIZE + 1.0, WIDEST / num_rows, 0.9 * _spacing(axes, xs) / num_rows)
    line: dict[str, Any] = {"linestyle": LINE_STYLES[index // 3 % len(LINE_STYLES)]}
    dots: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": min(MARKER_SIZE, 1.2 * step),
    }
    aside = (index - (num_rows - 1) / 2) * step / 72
    shifted = axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
    axes.plot([], [], label=name, **line, **dots)  # for the legend
    axes.plot(xs, ys, transform=shifted, linewidth=1, zorder=2, color=colour, **line)
    if errors is not None:
        axes.errorbar(
            xs, ys, yerr=errors, fmt="none", ecolor=colour, capsize=2, transform=shifted, zorder=2
        )
    axes.plot(xs, ys, transform=shifted, zorder=3, linestyle="none", **dots)


def _spacing(axes: Any, xs: Sequence[float]) -> float:
    """Points of the page between neighbours of rising xs, as `_log_axis` will lay them out."""
    width = 72 * axes.get_position().width * axes.figure.get_figwidth()
    if len(xs) < 2:
        return float(width)
    octaves = math.log2(xs[-1] / xs[0]) * (1 + 2 * MARGIN)
    nearest = min(math.log2(after / before) for before, after in pairwise(xs))
    return float(width * nearest / max(octaves, 1.0))


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
