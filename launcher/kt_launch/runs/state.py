"""The state that a live run records about itself: state.json in its folder, and whether the processes named there are
still the same ones. Reads and writes that file; ends no process.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kt_launch.machine.process_identity import ProcessIdentity
from kt_launch.runs.best_effort import say_refused
from kt_model.atomic_file import read_regular
from kt_model.contract import READY as READY
from kt_model.contract import STATE_FILE
from kt_model.jsonfile import write_json

STARTING, RESTARTING, ENDED = "starting", "restarting", "ended"
UNRESPONSIVE = "unresponsive"
"""It was ready, and its schedulers have not answered for a while."""
RETRY_S = 5.0
"""Between retries after the disk has refused a write."""
LOST = "lost"
"""Never written: the state a reader infers when the launcher is gone without recording an end."""


@dataclass
class Attempt:
    """One start of the server within a run."""

    started_at: float
    ready_after_s: float | None = None
    ended_at: float | None = None
    ending: str | None = None
    cause: str | None = None


@dataclass
class State:
    """The contents of state.json."""

    state: str
    launcher: ProcessIdentity
    url: str
    detached: bool = False
    server: ProcessIdentity | None = None
    metrics_url: str | None = None
    playground_url: str | None = None
    exit_code: int | None = None
    error: str | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def now(self) -> str:
        """The current state, which may be newer than the last one written."""
        return LOST if self.state != ENDED and not self.launcher.alive else self.state

    @property
    def lives(self) -> bool:
        """Whether its launcher is alive."""
        return self.now in (STARTING, READY, RESTARTING, UNRESPONSIVE)

    @property
    def restarts(self) -> int:
        return max(len(self.attempts) - 1, 0)


def read_state(folder: Path) -> State | None:
    """The state recorded in a run folder, or None if no server was started from it."""
    try:
        return _file_of_state().validate_json(read_regular(folder / STATE_FILE))
    except (OSError, ValidationError):
        return None


@functools.cache
def _file_of_state() -> TypeAdapter[State]:
    return TypeAdapter(State)


def close_state(folder: Path, error: str) -> None:
    """Record the end of a run on behalf of a launcher that is gone."""
    state = read_state(folder)
    if state is not None:
        state.state, state.error = ENDED, error
        _write(folder, state)


def _write(folder: Path, state: State) -> None:
    write_json(folder / STATE_FILE, asdict(state))


class RunStateWriter:
    """Keeps a run's state.json up to date; every change is written at once. Once the run has begun, a write that the
    disk refuses is reported, ends nothing, and is retried until it succeeds."""

    def __init__(self, folder: Path, url: str, detached: bool = False) -> None:
        """Raises OSError."""
        self._folder = folder
        self._refused_at: float | None = None
        self.state = State(STARTING, ProcessIdentity.of(os.getpid()), url, detached)
        _write(folder, self.state)

    def starting(self, server_pid: int) -> None:
        """A server process was started."""
        self.state.state = RESTARTING if self.state.attempts else STARTING
        self.state.server = ProcessIdentity.of(server_pid)
        self.state.attempts.append(Attempt(time.time()))
        self._write()

    def ready(self) -> None:
        self.state.state = READY
        self.state.attempts[-1].ready_after_s = round(time.time() - self.state.attempts[-1].started_at, 2)
        self._write()

    def answers(self, now: bool) -> None:
        """Record whether a server that was ready still answers; written only on a change."""
        if (self.state.state == READY) != now:
            self.state.state = READY if now else UNRESPONSIVE
            self._write()
        elif self._refused_at is not None and time.monotonic() - self._refused_at >= RETRY_S:
            self._write()

    def exports_metrics(self, url: str) -> None:
        self.state.metrics_url = url
        self._write()

    def serves_playground(self, url: str) -> None:
        self.state.playground_url = url
        self._write()

    def attempt_ended(self, ending: str, cause: str | None = None) -> None:
        """The server process has ended; the run may go on with another one."""
        attempt = self.state.attempts[-1]
        attempt.ended_at, attempt.ending, attempt.cause = time.time(), ending, cause
        if self.state.state in (READY, UNRESPONSIVE):  # there is no server until the next attempt, if any
            self.state.state = RESTARTING
        self._write()

    def ended(self, exit_code: int, error: str | None = None) -> None:
        """The run is over."""
        self.state.state, self.state.exit_code, self.state.error = ENDED, exit_code, error
        self._write()

    def _write(self) -> None:
        try:
            _write(self._folder, self.state)
            self._refused_at = None
        except OSError as failure:
            if self._refused_at is None:
                say_refused(self._folder / STATE_FILE, failure)
            self._refused_at = time.monotonic()
