"""The plots of a report: every row can be told from the others, where all of them are equal too."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from drope_kernels.evaluate import MeanLoss, PositionBucket, Proportion, SweepRow

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb

from drope_kernels.evaluate import plots

LENGTHS = (128, 256, 512, 4096)
SEVEN = 7  # the rows of a model with RoPE


def rows_alike(number, slope):
    """Rows with the same numbers: level, or falling with the length."""
    losses = {n: MeanLoss((3.0 + slope * i,), 60) for i, n in enumerate(LENGTHS)}
    scores = {n: Proportion(10 - int(2 * slope * i), 20) for i, n in enumerate(LENGTHS)}
    ends = [2**i for i in range(13)]
    buckets = [
        PositionBucket(start, stop, MeanLoss((3.0 + slope * i,), 60))
        for i, (start, stop) in enumerate(pairwise(ends))
    ]
    return [
        SweepRow(f"row {i}", {"single": scores}, losses, losses, buckets) for i in range(number)
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of files."""
    drawn = {}

    def save(figure, axes, path):
        axes.legend()
        shown = axes.get_legend().get_lines()
        styles = {(x.get_color(), x.get_marker()) for x in shown}
        assert len(styles) == len(shown) == len(marked(axes))
        assert styles == {(x.get_color(), x.get_marker()) for x in marked(axes)}
        axes.get_legend().remove()
        drawn[path.name] = figure

    monkeypatch.setattr(plots, "_save", save)
    yield drawn
    for figure in drawn.values():
        plots.plt.close(figure)


def marked(axes):
    dots = [line for line in axes.lines if line.get_marker() in set(plots.MARKERS)]
    return [line for line in dots if len(line.get_xdata())]  # others are for the legend


@pytest.mark.parametrize("slope", [0.0, 0.4])
@pytest.mark.parametrize("number", [SEVEN, 12])
def test_rows_that_coincide_are_all_seen(figures, tmp_path, number, slope):
    """At every point the middle of each row's marker has the row's own colour."""
    plots.write_plots(rows_alike(number, slope), 128, tmp_path)
    assert set(figures) == {plots.RETRIEVAL, plots.TEXT_LOSS, plots.BY_POSITION}
    for figure in figures.values():
        figure.canvas.draw()
        image = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255
        (axes,) = figure.axes
        lines = marked(axes)
        assert len(lines) == number
        for line in lines:
            colour = np.array(to_rgb(line.get_color()))
            for x, y in line.get_transform().transform(line.get_xydata()):
                pixels = image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
                assert np.abs(pixels - colour).max(axis=1).min() < 0.02, (line.get_label(), x, y)


def test_rows_stand_where_their_lengths_are(figures, tmp_path):
    """Shifted on the page by less than a step of the axis; the numbers are the row's own."""
    plots.write_plots(rows_alike(SEVEN, 0.4), 128, tmp_path)
    (axes,) = figures[plots.TEXT_LOSS].axes
    figures[plots.TEXT_LOSS].canvas.draw()
    lines = marked(axes)
    for line in lines:
        assert line.get_xdata().tolist() == list(LENGTHS)
        assert line.get_ydata().tolist() == pytest.approx([3.0, 3.4, 3.8, 4.2])
        drawn = line.get_transform().transform(line.get_xydata())[:, 0]
        meant = axes.transData.transform(line.get_xydata())[:, 0]
        assert np.abs(drawn - meant).max() < np.diff(meant).min() / 2
    low, high = axes.get_xlim()
    assert low < LENGTHS[0]
    assert high > LENGTHS[-1]
