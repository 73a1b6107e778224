"""The report of a sweep: a table on the terminal, and results.md, .csv, .json and .html in its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kt_launch.sweeps.folder import OK, Row
from kt_launch.sweeps.page import to_html
from kt_launch.sweeps.tables import HEADINGS, lines, result, settings, to_csv, to_json, to_markdown, verdict
from kt_model.atomic_file import write_text
from kt_model.printable import printable

PIPE_WIDTH = 80
SHORT = {
    "settings": "settings",
    "target": "target",
    "first token, ms": "first\nms",
    "next token, ms": "next\nms",
    "tokens/s": "tokens/s\nat best",
    "experts, GiB": "experts\nGiB",
    "start, s": "start\ns",
    "KL to BF16": "KL to\nBF16",
    "same top-1": "same\ntop-1",
}
"""The columns of the terminal's table, which fits into 80; the other forms have all columns."""


def show_report(rows: Sequence[Row]) -> None:
    """On the terminal: the table, why jobs were not measured, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for number, heading in enumerate(SHORT.values()):
        table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold", no_wrap=number > 0)
    for line in lines(rows):
        if line.row["state"] == OK:
            table.add_row(
                *(
                    printable(cell.partition(" (at ")[0])
                    for name, cell in zip(HEADINGS, line.cells, strict=True)
                    if name in SHORT
                )
            )
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, highlight=False)
    if table.row_count:
        console.print(table)
    for row in rows:
        if row["state"] != OK:
            console.print(printable(f"{settings(row, rows)}: {result(row)}"), style="red", soft_wrap=True)
    for sentence in verdict(rows):
        console.print(printable(sentence), soft_wrap=not sys.stdout.isatty())


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Writes all forms; returns the HTML page."""
    forms = {"md": to_markdown, "csv": to_csv, "json": to_json, "html": to_html}
    for suffix, form in forms.items():
        write_text(folder / f"results.{suffix}", form(rows))
    return folder / "results.html"
