"""A process recorded in a file, distinguished from a later one with the same pid. Can signal it; what is done with a
run's processes is decided in running/.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from kt_launch.machine.kernel import read_text

START_TICKS_FIELD = 19
"""Of /proc/<pid>/stat, counted after the name in parentheses: when the process started, in ticks since boot."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinguished from a later one with the same pid."""

    pid: int
    start_ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Of a live process, or of one that has just ended (start_ticks 0: never alive)."""
        return cls(pid, _start_ticks(pid) or 0, _boot())

    @property
    def same_boot(self) -> bool:
        return self.boot == _boot()

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self.same_boot and self.start_ticks != 0 and _start_ticks(self.pid) == self.start_ticks

    def send(self, number: int) -> bool:
        """Signal this very process, never a later one with its pid; returns whether it was alive."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)

    @property
    def replaced(self) -> bool:
        """Whether another process has its pid now."""
        ticks = _start_ticks(self.pid)
        return not self.same_boot or (ticks is not None and ticks != self.start_ticks)


def _start_ticks(pid: int) -> int | None:
    """None if no process has the pid, or only a zombie."""
    fields = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return None if not fields or fields[0] in "ZX" else int(fields[START_TICKS_FIELD])


def _boot() -> str:
    return read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
