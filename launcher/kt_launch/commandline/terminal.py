"""What people see on the terminal: plans, records, mistakes. Decides nothing; stdout gets results, stderr the rest."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kt_model.errors import LaunchError, LaunchErrors, errors_of
from kt_model.printable import KEPT, printable

if TYPE_CHECKING:
    from kt_model.plan import LaunchPlan

FIT = ("fit", "fit.free")
PIPE_WIDTH = 160
"""Columns of a table that no terminal limits."""
GAP = "  "
LEAST_WIDTH = 8


def print_mistakes(failure: LaunchError | LaunchErrors) -> None:
    """One line each, without a traceback."""
    for error in errors_of(failure):
        print(f"error: {printable(str(error))}", file=sys.stderr)


def print_plan(plan: LaunchPlan) -> None:
    """The resolved values with their sources, the warnings, and the command as a shell takes it."""
    shown = ((key, item) for key, item in plan.resolved.items() if key not in FIT)
    print_table(("key", "value", "source"), [(key, show_value(item.value), item.source) for key, item in shown])
    print_fit(plan)
    for warning in plan.warnings:
        print(f"\nwarning: {printable(warning)}")
    print(f"\n{printable(shell_command(plan), KEPT)}")


def print_fit(plan: LaunchPlan) -> None:
    """What the launch takes of each memory, against what is free there."""
    if not all(key in plan.resolved and plan.value(key) for key in FIT):
        return
    needs, free = (plan.value(key) for key in FIT)
    parts = list(dict.fromkeys(part for place in needs.values() for part in place))
    rows = [
        (name, *(_gib(place.get(part)) for part in parts), _gib(sum(place.values())), _gib(free[name]))
        for name, place in needs.items()
    ]
    print()
    print_table(("fit (GiB)", *parts, "needed", "free now"), rows)


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal, or as a pipe's reader can bear; the first column is never broken.

    Plain text, because a table package takes longer to import than a plan to make.
    """
    on_terminal = sys.stdout.isatty()
    rows = [[printable(cell, KEPT) for cell in row] for row in rows]
    columns = [[row[number] for row in (header, *rows)] for number in range(len(header))]
    widths = _column_widths(columns, shutil.get_terminal_size().columns if on_terminal else PIPE_WIDTH)
    for number, row in enumerate((header, *rows)):
        for line in _table_lines(row, widths):
            print(f"\033[1m{line}\033[0m" if on_terminal and number == 0 else line)


def _column_widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """The first column whole; of the others narrow ones whole, and what is left in equal parts to the wide ones."""
    natural = [max(len(cell) for cell in column) for column in columns]
    widths = list(natural)
    left = width - natural[0] - len(GAP) * (len(columns) - 1)
    others = sorted(range(1, len(columns)), key=lambda number: natural[number])
    for done, number in enumerate(others):
        widths[number] = max(min(natural[number], left // (len(others) - done)), LEAST_WIDTH)
        left -= widths[number]
    return widths


def _table_lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    folded = [
        [line for part in cell.splitlines() for line in textwrap.wrap(part, width, break_on_hyphens=False)]
        for cell, width in zip(row, widths, strict=True)
    ]
    for cells in itertools.zip_longest(*folded, fillvalue=""):
        yield GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def show_value(value: Any) -> str:
    """A value as a cell: as it is typed; facts one after another, and bytes by what takes them."""
    if value is None or value == {}:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {_bytes(size)}" for name, size in value.items())
    if isinstance(value, list) and not any(isinstance(row, dict) for row in value):
        return f"[{','.join(str(item) for item in value)}]"
    if isinstance(value, list):
        return "; ".join(", ".join(f"{name} {fact}" for name, fact in row.items() if fact is not None) for row in value)
    return str(value)


def _bytes(size: Any) -> str:
    """Of one memory, or of its parts together; a plan that somebody edited may say anything."""
    parts = [*size.values()] if isinstance(size, dict) else [size]
    return f"{_gib(sum(parts))} GiB" if all(type(part) is int and part < 2**62 for part in parts) else str(size)


def shell_command(plan: LaunchPlan) -> str:
    """The exact command with its environment, quoted for a shell."""
    words = [f"{name}={shlex.quote(value)}" for name, value in plan.env.items()]
    return " ".join([*words, *(shlex.quote(word) for word in plan.argv)])


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """The end of a multirun: what was run, and how each ended."""
    for record in records:
        overrides = " ".join(shlex.quote(override) for override in record["overrides"]) or "(no overrides)"
        print(f"job {record['number']}: {printable(overrides)}: exit {record['exit_code']}", file=sys.stderr)
