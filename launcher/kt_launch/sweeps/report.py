"""The end of a sweep: a table on the terminal, and results.md, .csv, .json and .html in its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kt_launch.sweeps.folder import OK, Row
from kt_launch.sweeps.page import to_html
from kt_launch.sweeps.tables import HEADINGS, lines, to_csv, to_json, to_markdown

PIPE_WIDTH = 160
RIGHT_ALIGNED = range(2, 9)


def show_report(rows: Sequence[Row]) -> None:
    """On the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number in RIGHT_ALIGNED else "left", overflow="fold")
    for line in lines(rows):
        style = "" if line.row["state"] == OK else "red"
        table.add_row(*(Text(cell, style=style) for cell in line.cells))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """All forms of it; the page."""
    forms = {"md": to_markdown, "csv": to_csv, "json": to_json, "html": to_html}
    for suffix, form in forms.items():
        (folder / f"results.{suffix}").write_text(form(rows), encoding="utf-8")
    return folder / "results.html"
