"""Whether and when a dead server is restarted: with growing delays, a limited number of times, and never if the same
start would fail the same way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kt_model.errors import EXIT_NOT_STARTED, EXIT_OK, ServerDidNotStart

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STABLE_S = 600.0
"""A server that lived this long has recovered: the next delay is short again."""
HEALTHY_S = 3600.0
"""After so long, the number of restarts starts anew."""
ROOM_BYTES, ROOM_PAUSE_S = 1 << 20, 2.0
"""What a server needs for its log before it is worth a start, and how often that is looked at."""


@dataclass(frozen=True)
class Ending:
    """How a server that had been ready ended."""

    exit_code: int
    lived_s: float
    configuration: bool = False
    watched: bool = True
    """Whether the terminal that it was started from still exists; a run ends with it."""


def supervise(run_once: Callable[[], Ending], restarts: int, pause: Callable[[float], None]) -> int:
    """Run the server, and restart it after a crash up to `restarts` times; returns the last exit code.

    The first start is never repeated: until it has worked once, a failure is a matter of configuration. Raises what
    run_once raises, except a failed restart that is worth another attempt.
    """
    failures, left = 0, restarts
    while True:
        try:
            ending = run_once()
        except ServerDidNotStart as failure:
            if left == restarts or left == 0 or is_configuration(failure):
                raise
            ending = Ending(EXIT_NOT_STARTED, 0.0)
        left = restarts if ending.lived_s >= HEALTHY_S else left
        if ending.exit_code == EXIT_OK or ending.configuration or not ending.watched or left == 0:
            return ending.exit_code
        failures = 1 if ending.lived_s >= STABLE_S else failures + 1
        seconds = pause_before(failures)
        print(f"kt-launch: starting the server again in {seconds:g} s ({left} of {restarts} left)", file=sys.stderr)
        pause(seconds)
        left -= 1


def pause_before(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 30), LONGEST_PAUSE_S)


def free_bytes(folder: Path) -> int | None:
    """Room on its disk; None where that cannot be told."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def first_full(folders: Iterable[Path], free: Callable[[Path], int | None] = free_bytes) -> Path | None:
    """The first folder whose disk has no room for a log."""
    return next((each for each in folders if (room := free(each)) is not None and room < ROOM_BYTES), None)


def wait_for_room(
    folder: Path, pause: Callable[[float], None], free: Callable[[Path], int | None] = free_bytes
) -> None:
    """Wait until the folder of a run has room for a log: a server that cannot write it ends at once, and would use up
    its restarts. Says so, once."""
    told = False
    while first_full([folder], free):
        if not told:
            print(f"kt-launch: the disk of {folder} is full: the server is started once it has room", file=sys.stderr)
        told = True
        pause(ROOM_PAUSE_S)


def is_configuration(failure: ServerDidNotStart) -> bool:
    """Whether the diagnosis says that the crash would happen again."""
    diagnosis = getattr(failure, "diagnosis", None)
    return diagnosis is not None and bool(diagnosis.configuration)
