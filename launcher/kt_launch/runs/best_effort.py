"""Writes to a live run's folder that must not end the run: when the disk refuses one, a message says so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from kt_model.printable import say


class Written:
    """Whether the block finished; known after it."""

    def __init__(self) -> None:
        self._whole = False

    def __bool__(self) -> bool:
        return self._whole

    def yes(self) -> None:
        self._whole = True


@contextlib.contextmanager
def best_effort(file: Path, silently: bool = False) -> Iterator[Written]:
    """Write `file` inside the block. An OSError is reported on stderr, unless `silently`, and does not leave the
    block."""
    written = Written()
    try:
        yield written
        written.yes()
    except OSError as failure:
        if not silently:
            reason = failure.strerror or str(failure)
            say(f"kt-launch: {file} cannot be written ({reason}); the server goes on without it", file=sys.stderr)
