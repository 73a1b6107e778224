"""Writes to a live run's folder that must not end the run: when the disk refuses one, a message says so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from kt_model.printable import say


@contextlib.contextmanager
def best_effort(file: Path) -> Iterator[None]:
    """Write `file` inside the block. An OSError is reported on stderr, and does not leave the block."""
    try:
        yield
    except OSError as failure:
        say_refused(file, failure)


def say_refused(file: Path, failure: OSError) -> None:
    """Report that the disk refused a file."""
    reason = failure.strerror or str(failure)
    say(f"kt-launch: {file} cannot be written ({reason}); the server goes on without it", file=sys.stderr)
