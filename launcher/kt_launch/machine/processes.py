"""Starting and stopping processes: signals to this one, sessions of children, and leaving none behind.

Not here: telling a process apart from a later one with the same pid (process_identity.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from kt_launch.machine.streams import ERR, OUT, silence

Process = psutil.Process

PR_SET_CHILD_SUBREAPER = 36
STOP_GRACE_S = 10.0
LEADER_GRACE_S = 1.0
"""SIGTERM ends SGLang's workers at once; its main process then treats that as a crash and spends 5 s examining it."""
SESSION_POLL_S, LEFT_POLL_S = 0.05, 0.1


class Stopped(Exception):
    """Ctrl-C, SIGTERM, or the end of its terminal reached this process: it ends what it started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.by_hand = number == signal.SIGINT


@contextlib.contextmanager
def stopped_by(*numbers: signal.Signals) -> Iterator[None]:
    """Within the block, the first of these signals raises Stopped in the main thread; further ones are ignored while
    what was started is being stopped. SIGHUP, sent when a terminal closes, counts unless nohup has set it to be
    ignored."""
    counted = [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in counted:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGHUP:  # writing to a closed terminal fails
            silence(stream for stream in (OUT, ERR) if os.isatty(stream))
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in counted}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def in_foreground() -> bool:
    """Whether there is a terminal whose Ctrl-C reaches this process."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def start_session(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A child in a session of its own, through which all its descendants can be found. Its stdin is empty, and its
    output goes to the log. PYTHONWARNINGS=error does not reach it: packages warn while they are imported."""
    with log.open("wb") as said:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**(os.environ if environment is None else environment), "PYTHONWARNINGS": ""},
            start_new_session=True,
        )


def stop(process: subprocess.Popen[Any], grace_s: float) -> None:
    """Stop a child and wait for it: SIGTERM first, SIGKILL after `grace_s`. A child that has ended is left alone."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_session(session: int) -> None:
    """End every process of a session: SIGTERM first, then SIGKILL. Works even if its first process ended long ago.

    The first process is ended before the rest, so that multiprocessing's resource tracker, which then ends by itself,
    can clean up.
    """
    begun = time.monotonic()
    for process in session_processes(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    while living := session_processes(session):
        waited = time.monotonic() - begun
        _kill(one for one in living if waited > (LEADER_GRACE_S if one.pid == session else STOP_GRACE_S))
        time.sleep(SESSION_POLL_S)


def ending_of(code: int) -> str:
    """How a process ended, by its exit code: negative for a signal."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def command_of(process: Process) -> str:
    """Its name according to its command line, since the kernel truncates its own; '' if it has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


COMPILERS = {"cc1plus": "g++", "cc1": "gcc", "clang": "clang", "cicc": "nvcc", "cudafe++": "nvcc", "ptxas": "ptxas"}
"""Process names, and the compilers that they belong to."""


def compilers_of(processes: Iterable[Process]) -> list[str]:
    """The compilers among them."""
    found: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.update(COMPILERS[name] for name in [process.name()] if name in COMPILERS)
    return sorted(found)


def works(process: Process) -> bool:
    """Whether the process still runs and is not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_stopped(process: Process) -> bool:
    """Whether a stop signal (such as SIGSTOP) suspends the process."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def session_processes(session: int) -> list[Process]:
    """All live processes of a session, and all their live children."""
    found: dict[int, Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
                found.update({child.pid: child for child in process.children(recursive=True)})
    return list(found.values())


def any_process_has(variable: str, value: str) -> bool:
    """Whether any process of this user was started with this environment variable: a server may outlive its
    launcher."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value:
                return True
    return False


def pids_below(parent: int) -> list[int]:
    """Pids of all live descendants of a process."""
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(parent).children(recursive=True)]
    return []


@contextlib.contextmanager
def nothing_left(grace_s: float) -> Iterator[None]:
    """Orphaned descendants are re-parented to this process, so that none is out of reach. At the end of the block, all
    processes that began within it have `grace_s` to end by themselves, and are killed then."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    finally:
        _end_left(before, grace_s)
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def _end_left(before: set[int], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while left := _left(before):
        if time.monotonic() > deadline:
            _kill(left)
        time.sleep(LEFT_POLL_S)


def _left(before: set[int]) -> list[Process]:
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


def _kill(processes: Iterable[Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
