"""Runs one job in a child process, and always ends every process that it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from kt_launch.machine.oom import MemoryKills
from kt_launch.machine.processes import ending_of, nothing_left, stop
from kt_launch.sweeps.folder import CRASHED, FAILED, OK, TIMEOUT
from kt_model.errors import EXIT_TOO_LONG

STOP_S = 90.0
"""A job that is told to stop ends its server first, which may take this long."""
LEFT_S = 20.0
"""Processes left by a finished job have this long to end by themselves."""


@dataclass(frozen=True)
class Ending:
    """How a job ended: its state, its exit code (128 + signal if a signal ended it), and a short explanation."""

    state: str
    exit_code: int
    error: str | None
    memory_ran_out: bool = False
    """Whether the kernel killed a process for lack of memory in the meantime."""


def run_isolated(command: Sequence[str], timeout_s: float, left_s: float = LEFT_S, quiet: bool = False) -> Ending:
    """Run the command to its end, or for `timeout_s`. On KeyboardInterrupt the job is stopped before it is re-raised.

    quiet: its stdout goes to stderr.
    """
    kills, late = MemoryKills(), False
    with nothing_left(left_s):
        out = sys.stderr if quiet else None
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            stop(process, STOP_S)
    return _judge(process.returncode, late, timeout_s, kills.any_since)


def _judge(code: int, late: bool, timeout_s: float, memory_ran_out: bool) -> Ending:
    if late:
        return Ending(TIMEOUT, EXIT_TOO_LONG, f"not done after {timeout_s:g} s (bench.timeout_s)", memory_ran_out)
    if code < 0:
        return Ending(CRASHED, 128 - code, ending_of(code), memory_ran_out)
    return Ending(FAILED, code, f"exit {code}", memory_ran_out) if code else Ending(OK, 0, None)
