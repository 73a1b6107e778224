"""Records of a run that lives: a disk that does not take one is told, and ends nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from kt_model.printable import say


class Written:
    """Whether the block came to its end; known after it."""

    def __init__(self) -> None:
        self._whole = False

    def __bool__(self) -> bool:
        return self._whole

    def yes(self) -> None:
        self._whole = True


@contextlib.contextmanager
def best_effort(file: Path, silently: bool = False) -> Iterator[Written]:
    """Write `file` in the block; what the disk refuses is told, unless that was done before."""
    written = Written()
    try:
        yield written
        written.yes()
    except OSError as failure:
        if not silently:
            reason = failure.strerror or str(failure)
            say(f"kt-launch: {file} cannot be written ({reason}); the server goes on without it", file=sys.stderr)
