"""A report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from drope_kernels.evaluate.report import Report, all_tables


def print_report(report: Report, console: Console) -> None:
    """All tables, findings and caveats."""
    for table in all_tables(report):
        shown = RichTable(title=table.title, caption=table.note, title_justify="left")
        for index, name in enumerate(table.header):
            shown.add_column(name, no_wrap=index == 0, justify="left" if index == 0 else "right")
        for row in table.rows:
            shown.add_row(*map(Text, row))  # a model's name is no markup
        console.print(shown)
    for title, sentences in (("Findings", report.findings), ("Caveats", report.caveats)):
        console.print(f"\n[bold]{title}[/bold]")
        for sentence in sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)
