"""Progress of a long job on stderr: on a terminal a bar with bytes, rate and time left, and everywhere a line per
layer.
"""

from __future__ import annotations

import sys
from typing import Any

from kt_model.printable import printable


class Bar:
    """A context manager. Without a terminal, only the lines are printed."""

    def __init__(self, what: str, total_bytes: int, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._progress = Progress(*columns, console=self._console, disable=quiet or not sys.stderr.isatty())
        self._task = self._progress.add_task(what, total=total_bytes)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def skip(self, count: int) -> None:
        """Count bytes that an earlier attempt has already processed."""
        self._progress.update(self._task, completed=self._progress.tasks[0].completed + count)

    def line(self, text: str) -> None:
        """Print a line that stays above the bar."""
        self._console.print(printable(text), markup=False)
