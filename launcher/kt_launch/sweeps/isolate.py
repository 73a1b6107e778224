"""Runs one job in a process of its own, and ends everything that is left of it, however it went."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from kt_launch.sweeps.folder import CRASHED, FAILED, OK, TIMEOUT

PR_SET_CHILD_SUBREAPER = 36
STOP_S = 90.0
"""A job that is told to stop first ends its server, which may take this long."""
LEFT_S = 20.0
"""What is left of a job that ended is on its way out, or is ended after this."""

EXIT_TIMEOUT = 124
"""As coreutils' timeout has it."""


@dataclass(frozen=True)
class Ending:
    """How a job ended: its state, its exit code (128 + signal where one ended it), and a word on it."""

    state: str
    exit_code: int
    error: str | None
    memory_ran_out: bool = False
    """Whether the kernel killed a process for memory meanwhile."""


def run_isolated(command: Sequence[str], timeout_s: float, left_s: float = LEFT_S) -> Ending:
    """Run the command to its end or for `timeout_s`. On KeyboardInterrupt the job is stopped before it is raised on."""
    kills_before = _oom_kills()
    with _adopted_children() as before:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout_s)
            late = False
        except subprocess.TimeoutExpired:
            late = True
            _stop(process)
        except BaseException:
            _stop(process)
            _end_left(before, left_s)
            raise
        _end_left(before, left_s)
    return _judge(process.returncode, late, timeout_s, _oom_kills() > kills_before)


def _judge(code: int, late: bool, timeout_s: float, memory_ran_out: bool) -> Ending:
    if late:
        return Ending(TIMEOUT, EXIT_TIMEOUT, f"not done after {timeout_s:g} s (bench.timeout_s)", memory_ran_out)
    if code < 0:
        return Ending(CRASHED, 128 - code, f"killed by {signal.Signals(-code).name}", memory_ran_out)
    return Ending(FAILED, code, f"exit {code}", memory_ran_out) if code else Ending(OK, 0, None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _adopted_children() -> Iterator[set[int]]:
    """Processes that lose their parent come to this one, so that none is out of reach; those there before."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield {child.pid for child in psutil.Process().children()}
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def _end_left(before: set[int], left_s: float) -> None:
    """Wait for what is left to end by itself, then end it."""
    deadline = time.monotonic() + left_s
    while left := _left(before):
        if time.monotonic() > deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.1)


def _left(before: set[int]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        if child.pid in before:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
            else:
                found += [child, *child.children(recursive=True)]
    return found


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory, on this machine and in this control group."""
    found = 0
    for file, name in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            rows = (line.split() for line in Path(file).read_text().splitlines())
            found += sum(int(row[1]) for row in rows if len(row) == 2 and row[0] == name)
    return found
