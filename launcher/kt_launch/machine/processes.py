"""Processes: how one is stopped, this one by signals too, and how none outlives the one that started it.

Not here: a process that is told apart from later ones with its number (process_identity.py).
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
"""SIGTERM ends SGLang's workers at once; its main process then takes that for a crash and waits 5 s to examine it."""
SESSION_POLL_S, LEFT_POLL_S = 0.05, 0.1


class Stopped(Exception):
    """Ctrl-C, SIGTERM, or the end of its terminal reached this process: it ends what it started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.by_hand = number == signal.SIGINT


@contextlib.contextmanager
def stopped_by(*numbers: signal.Signals) -> Iterator[None]:
    """Within the block the first of these signals raises Stopped in the main thread; further ones are ignored while
    what was started is being ended. SIGHUP, which a terminal sends that is closed, counts unless nohup has it ignored.
    """
    counted = [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in counted:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGHUP:  # writing to a terminal that is closed fails
            silence(stream for stream in (OUT, ERR) if os.isatty(stream))
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in counted}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def in_foreground() -> bool:
    """Whether a terminal is there whose Ctrl-C reaches this process."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def start_session(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A child in its own session, by which every process of it is found; it reads nothing, and what it says is in
    the log."""
    with log.open("wb") as said:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[Any], grace_s: float) -> None:
    """End a child and wait for it: politely, after `grace_s` by force. One that has ended is left alone."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_session(session: int) -> None:
    """End every process of a session: politely, then by force. Works when its first process is long gone.

    The first process goes before what remains, so that multiprocessing's resource tracker, which ends by itself then,
    can clean up after it.
    """
    begun = time.monotonic()
    for process in session_processes(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    while living := session_processes(session):
        waited = time.monotonic() - begun
        _kill(one for one in living if waited > (LEADER_GRACE_S if one.pid == session else STOP_GRACE_S))
        time.sleep(SESSION_POLL_S)


def command_of(process: Process) -> str:
    """As it calls itself in its command line, since the kernel's own field is shorter; '' when it is gone."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


COMPILERS = {"cc1plus": "g++", "cc1": "gcc", "clang": "clang", "cicc": "nvcc", "cudafe++": "nvcc", "ptxas": "ptxas"}
"""Names of processes, and the compilers that they are part of."""


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
    """Whether a signal (SIGSTOP and its kind) keeps the process from going on."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def session_processes(session: int) -> list[Process]:
    """All living processes of a session, and all living children of theirs."""
    found: dict[int, Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
                found.update({child.pid: child for child in process.children(recursive=True)})
    return list(found.values())


def any_process_has(variable: str, value: str) -> bool:
    """Whether a process of this user was started with this environment variable: a server may outlive its launcher."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value:
                return True
    return False


def pids_below(parent: int) -> list[int]:
    """Of all living processes that a process has started, and those have."""
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(parent).children(recursive=True)]
    return []


@contextlib.contextmanager
def nothing_left(grace_s: float) -> Iterator[None]:
    """Processes that lose their parent come to this one, so that none is out of reach. At the block's end all that
    began within it have `grace_s` to end by themselves, and are killed then."""
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
