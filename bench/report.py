"""Tables, JSON and plots of measured rows."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import drope_kernels

Row = Mapping[str, object]

COLUMNS = (
    ("contender", "contender", "{}"),
    ("median ms", "median_ms", "{:.3f}"),
    ("spread", "spread", "{:.1%}"),
    ("GFLOP/s", "gflops", "{:.1f}"),
    ("of peak", "peak_fraction", "{:.1%}"),
    ("drope is", "speedup_of_drope", "{:.2f}x"),
    ("extra MiB", "peak_extra_mib", "{:.0f}"),
)


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    names = Path("/proc/cpuinfo")
    model = platform.processor()
    if names.exists():
        lines = names.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "build": drope_kernels.build_info(),
    }


def _cell(template: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return template.format(value)


def print_table(rows: Iterable[Row], write: Callable[[str], None]) -> None:
    """One readable table, a section per case."""
    shown = Table(box=box.SIMPLE_HEAD)
    for index, (title, _, _) in enumerate(COLUMNS):
        shown.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    case = None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            shown.add_section()
            shown.add_row(f"[bold]{case}[/bold]")
        first, *rest = (_cell(template, row[key]) for _, key, template in COLUMNS)
        shown.add_row(f"  {first}", *rest)
    console = Console(width=130, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    write(capture.get())


def save(rows: list[Row], directory: Path) -> Path:
    """Write rows with the machine they belong to as <cpu>-<date>-<commit>.json."""
    directory.mkdir(parents=True, exist_ok=True)
    about = machine()
    build = about["build"]
    commit = str(build.get("commit", "unknown"))[:12] if isinstance(build, dict) else "unknown"
    cpu = "".join(c if c.isalnum() else "-" for c in str(about["cpu"]).lower()).strip("-")
    path = directory / f"{cpu}-{about['date']}-{commit}.json"
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return path


def write_markdown(rows: list[Row], directory: Path) -> Path:
    """Every row as one Markdown table, with the machine it belongs to above."""
    about = machine()
    build = about["build"]
    lines = [
        f"CPU {about['cpu']}, Python {about['python']}, torch {about['torch']}, {about['date']}, "
        f"commit {build.get('commit') if isinstance(build, dict) else 'unknown'}.",
        "",
        "| case | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---|---|" + "---:|" * (len(COLUMNS) - 1),
    ]
    for row in rows:
        cells = (_cell(template, row[key]) for _, key, template in COLUMNS)
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    path = directory / "table.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Throughput over length, one picture per direction and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        direction, dtype, head_dim, seqlen, *rest = str(row["case"]).split("-")
        if rest not in (["H8", "causal"], ["H1", "causal"]):
            continue
        label = f"{row['contender']} {head_dim}"
        point = (int(seqlen[1:]), float(str(row["gflops"])))
        lines.setdefault((direction, dtype), {}).setdefault(label, []).append(point)
    paths = []
    for (direction, dtype), curves in lines.items():
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        for label, points in sorted(curves.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("sequence length")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"causal {direction}, {dtype}, one thread")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        paths.append(directory / f"{direction}-{dtype}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return paths
