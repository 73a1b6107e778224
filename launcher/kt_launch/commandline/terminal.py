"""Terminal output: plans, records, mistakes. Decides nothing; results go to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kt_model.errors import LaunchError, LaunchErrors, errors_of
from kt_model.printable import KEPT, printable

if TYPE_CHECKING:
    from kt_model.plan import LaunchPlan

FIT = ("fit", "fit.free")
FOLDER = re.compile(r"model\.path|lora\.[^.]+\.path")
PIPE_WIDTH = 160
"""Columns of a table if there is no terminal."""
PAGE_WIDTH = 80
"""Columns of a help page if there is no terminal."""
WHOLE = 1 << 20
"""Columns of lines that are folded only for a terminal."""
GAP = "  "
LEAST_WIDTH = 8
READABLE = 20
"""Below this many columns, a cell of several lines is too narrow to read."""
MOST_LINES = 3
COMMAND = re.compile(r"\s+(kt-launch|echo)\b")
NAME_AND_REST = re.compile(r"(?P<name>\s*\S(?:.*?\S)?)(?P<gap>\s{2,})(?P<rest>\S.*)")
UNIT = re.compile(r" \(\w+\)$")
"""Of a table's numbers, in the first column's heading."""
BREAKS = re.compile(r"(?<=[/,])")
"""Where a path or a list is broken over lines."""


def print_mistakes(failure: LaunchError | LaunchErrors) -> None:
    """One line each, without a traceback."""
    for error in errors_of(failure):
        print(f"error: {printable(str(error))}", file=sys.stderr)


def print_plan(plan: LaunchPlan) -> None:
    """The resolved values with their sources, the warnings, and the command in shell syntax."""
    shown = [(key, item) for key, item in plan.resolved.items() if key not in FIT]
    folders = [f"{item.value}/" for key, item in shown if FOLDER.fullmatch(key)]
    rows = [(key, show_value(item.value), _without(item.source, folders)) for key, item in shown]
    print_table(("key", "value", "source"), rows)
    print_fit(plan)
    for warning in plan.warnings:
        print(f"\nwarning: {printable(warning)}")
    print(f"\n{printable(shell_command(plan), KEPT)}")


def _without(source: str, folders: Sequence[str]) -> str:
    """A source without the folder of the model or the adapter, which has a row of its own."""
    found = (folder for folder in folders if source.startswith(f"probed: {folder}"))
    return source.replace(next(found, ""), "", 1)


def print_fit(plan: LaunchPlan) -> None:
    """How much of each memory the launch needs, and how much is free."""
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


def is_plain() -> bool:
    """Whether to print without colours: to a pipe, to a terminal without them, or if the user wants none (NO_COLOR)."""
    return not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


@contextlib.contextmanager
def activity() -> Iterator[Callable[[str], None]]:
    """Shows what a command is doing in a line of stderr that is gone afterwards; nothing if that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    with Status("", console=Console(stderr=True, highlight=False)) as status:
        yield lambda what: status.update(Text(what, no_wrap=True, overflow="ellipsis"))


def _columns(without_terminal: int) -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else without_terminal


def folded(page: str, without_terminal: int = PAGE_WIDTH) -> str:
    """A help page folded to the terminal's width: explanations are wrapped, commands stay whole. If one of several
    commands does not fit beside what it is for, that is below each of them."""
    width = _columns(without_terminal)
    lines: list[str] = []
    for are_commands, found in itertools.groupby(page.splitlines(), lambda line: bool(COMMAND.match(line))):
        block = list(found)
        fits = max(map(len, block)) <= width
        lines += [part for line in block for part in _folded_line(line, width, are_commands, fits)]
    return "\n".join(lines)


def _folded_line(line: str, width: int, is_command: bool, fits: bool) -> list[str]:
    if fits or (len(line) <= width and not is_command):
        return [line]
    return _command_and_meaning(line) if is_command else _fold(line, width)


def _command_and_meaning(line: str) -> list[str]:
    parts = NAME_AND_REST.match(line)
    return [parts["name"], f"      {parts['rest']}"] if parts else [line]


def _fold(line: str, width: int) -> list[str]:
    """One line as several. The text left of a gap gets a line of its own if it leaves too little space."""
    parts = NAME_AND_REST.match(line)
    indent = len(parts["name"] + parts["gap"]) if parts else len(line) - len(line.lstrip())
    if parts and (indent > width - READABLE or max(map(len, parts["rest"].split())) > width - indent):
        return [parts["name"], *textwrap.wrap(parts["rest"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal, or a fixed width for a pipe; the first column is never wrapped. If columns would
    become too narrow, each row is printed as a paragraph.

    Plain text, because importing a table library takes longer than making a plan.
    """
    width, plain = _columns(PIPE_WIDTH), is_plain()
    rows = [[printable(cell, KEPT) for cell in row] for row in rows]
    columns = [[row[number] for row in (header, *rows)] for number in range(len(header))]
    widths = _column_widths(columns, width)
    is_wide = sum(widths) + len(GAP) * (len(widths) - 1) > width
    if is_wide or any(_is_sliver(column, given) for column, given in zip(columns[1:], widths[1:], strict=True)):
        return _print_paragraphs(header, rows, width, plain)
    for number, row in enumerate((header, *rows)):
        for line in _table_lines(row, widths):
            print(f"\033[1m{line}\033[0m" if not plain and number == 0 else line)
    return None


def _is_sliver(column: Sequence[str], width: int) -> bool:
    """Whether it would wrap into many short lines, or break words."""
    longest = max(len(word) for cell in column for word in cell.split() or [""])
    return width < READABLE and (max(map(len, column)) > MOST_LINES * width or longest > width)


def _print_paragraphs(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, plain: bool) -> None:
    label, unit = max(len(name) for name in header[1:]), UNIT.search(header[0])
    for first, *others in rows:
        title = first + unit[0] if unit else first
        print(title if plain else f"\033[1m{title}\033[0m")
        for name, cell in zip(header[1:], others, strict=True):
            for number, line in enumerate(_cell_lines(cell, max(width - label - 2 * len(GAP), READABLE))):
                print(f"{GAP}{'' if number else name:<{label}}{GAP}{line}")


def _cell_lines(cell: str, width: int) -> list[str]:
    """A word that is wider than the cell, such as a path, is broken after one of BREAKS, if that is possible."""
    parts = (" ".join(_broken(word, width) for word in part.split(" ")) for part in cell.splitlines())
    lines = (line for part in parts for line in part.splitlines())
    return [line for part in lines for line in textwrap.wrap(part, width, break_on_hyphens=False)]


def _broken(word: str, width: int) -> str:
    """Its lines; a part that is wider than the cell is left to the wrapping."""
    if len(word) <= width:
        return word
    lines = [""]
    for part in BREAKS.split(word):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _column_widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """The first column and narrow ones at full width; the wide ones share the rest equally."""
    natural = [max(len(cell) for cell in column) for column in columns]
    widths = list(natural)
    left = width - natural[0] - len(GAP) * (len(columns) - 1)
    others = sorted(range(1, len(columns)), key=lambda number: natural[number])
    for done, number in enumerate(others):
        widths[number] = min(natural[number], max(left // (len(others) - done), LEAST_WIDTH))
        left -= widths[number]
    return widths


def _table_lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    lines = [_cell_lines(cell, width) for cell, width in zip(row, widths, strict=True)]
    for cells in itertools.zip_longest(*lines, fillvalue=""):
        yield GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def show_value(value: Any) -> str:
    """A value as a table cell: as typed; facts separated by commas, and bytes by what needs them."""
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
    """One memory, or the sum of its parts; an edited plan may contain anything."""
    parts = [*size.values()] if isinstance(size, dict) else [size]
    return f"{_gib(sum(parts))} GiB" if all(type(part) is int and part < 2**62 for part in parts) else str(size)


def shell_command(plan: LaunchPlan) -> str:
    """The exact command with its environment, quoted for a shell."""
    words = [f"{name}={shlex.quote(value)}" for name, value in plan.env.items()]
    return " ".join([*words, *(shlex.quote(word) for word in plan.argv)])


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """The end of a multirun: each job, and how it ended."""
    for record in records:
        overrides = shlex.join(record["overrides"]) or "(no overrides)"
        print(f"job {record['number']}: {printable(overrides)}: exit {record['exit_code']}", file=sys.stderr)
