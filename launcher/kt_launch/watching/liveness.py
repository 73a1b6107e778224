"""Whether a server that was ready still works: its schedulers are queried at intervals, messages sent to the
detokenizer are compared with those that came back, and its processes are counted.

A scheduler answers between two batches, also while it computes a long prompt in chunks, so busy is not hung. Not here:
what follows from a hang (server.py), whether the server is restarted (supervision.py).
"""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx

from kt_launch.machine.processes import Process, command_of, is_stopped, session_processes, works
from kt_model.contract import OUTPUTS_RECEIVED, REPORT
from kt_model.errors import LaunchError

INTERVAL_S = 10.0
ASK_S = 30.0
DEAD_GRACE_S, LEAST_GRACE_S = 10.0, 2.0
"""SGLang ends itself when it notices that a scheduler is gone, and gets this long to do so and to say why. It does not
notice the loss of another process, unless that process itself reported it."""
SCHEDULER = "scheduler"
SGLANG = "sglang::"
"""SGLang's names of its processes."""
STACKS_S = 20.0


class Unresponsive(Exception):
    """The server process exists but does not respond any more."""


class Liveness:
    """Watches one server from the moment that it is ready. timeout_s: silence that counts as a hang; 0: never."""

    def __init__(self, session: int, connect: Callable[[float], httpx.Client], timeout_s: float) -> None:
        self._session, self._connect, self._timeout_s = session, connect, timeout_s
        self._answered_at = time.monotonic()
        self._over = threading.Event()
        self._processes = [each for each in session_processes(session) if command_of(each).startswith(SGLANG)]
        self._names = {each.pid: command_of(each) for each in self._processes}
        self._missed_at: float | None = None
        self._still_at: float | None = None
        self._received, self._waiting_at = 0, math.inf

    def __enter__(self) -> Liveness:
        if self._timeout_s:
            threading.Thread(target=self._ask, name="liveness", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @property
    def answers(self) -> bool:
        """Whether there was an answer recently: within a third of the time that counts as a hang."""
        return not self._timeout_s or max(self._silent_s, self._still_s, self._waiting_s) < self._timeout_s / 3

    def require_working(self) -> None:
        """Raise Unresponsive with what is wrong."""
        if self._timeout_s and self._silent_s >= self._timeout_s:
            raise Unresponsive(f"its schedulers have not answered for {self._silent_s:.0f} s (server.hang_timeout_s)")
        if self._timeout_s and self._waiting_s >= self._timeout_s:
            problem = f"its detokenizer has passed on nothing of what schedulers sent it for {self._waiting_s:.0f} s"
            raise Unresponsive(f"{problem} (server.hang_timeout_s)")
        self._require_moving()
        dead = [self._names[each.pid] for each in self._processes if not works(each)]
        self._missed_at = (self._missed_at or time.monotonic()) if dead else None
        grace_s = DEAD_GRACE_S if any(SCHEDULER in name for name in dead) else LEAST_GRACE_S
        if self._missed_at is not None and time.monotonic() - self._missed_at >= grace_s:
            raise Unresponsive(f"{', '.join(dead)} ended, and the rest of the server goes on without it")

    def _require_moving(self) -> None:
        """A detokenizer suspended by a signal lets schedulers answer, but blocks every request."""
        still = [self._names[each.pid] for each in self._processes if is_stopped(each)]
        self._still_at = (self._still_at or time.monotonic()) if still else None
        if self._timeout_s and self._still_s >= self._timeout_s:
            names = ", ".join(still)
            raise Unresponsive(f"{names} has stood still for {self._still_s:.0f} s (server.hang_timeout_s)")

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._answered_at

    @property
    def _still_s(self) -> float:
        return 0.0 if self._still_at is None else time.monotonic() - self._still_at

    @property
    def _waiting_s(self) -> float:
        """How long the detokenizer has had messages to pass on without passing on any."""
        return max(0.0, time.monotonic() - self._waiting_at)

    def _ask(self) -> None:
        interval_s = min(INTERVAL_S, self._timeout_s / 6)
        with self._connect(min(ASK_S, self._timeout_s)) as client:
            while not self._over.wait(interval_s):
                with contextlib.suppress(httpx.HTTPError, LaunchError):
                    found = client.get("/server_info").raise_for_status()
                    self._answered_at = time.monotonic()
                    self._compare(*outputs_of(found))
                if self._waiting_s >= self._timeout_s / 3:
                    with contextlib.suppress(httpx.HTTPError, LaunchError):
                        client.get("/health_generate", timeout=interval_s)

    def _compare(self, sent: int, received: int) -> None:
        """A message that never gets an answer is not a hang as long as later ones do: while one is missing, a
        generation is requested, which sends another."""
        if sent <= received:
            self._waiting_at = math.inf
        elif received != self._received or self._waiting_at == math.inf:
            self._waiting_at = time.monotonic()
        self._received = received


def outputs_of(server_info: httpx.Response) -> tuple[int, int]:
    """Messages that schedulers sent to the detokenizer, and messages that came back; (0, 0) if the answer does not
    say."""
    try:
        told = server_info.json()
        return sum(int(each[REPORT]["outputs_sent"]) for each in told["internal_states"]), int(told[OUTPUTS_RECEIVED])
    except (KeyError, TypeError, ValueError):
        return 0, 0


def write_stacks(file: Path, processes: Iterable[Process]) -> None:
    """What each process is doing according to py-spy, without their cooperation; nothing if py-spy is not installed."""
    command = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if command is None:
        return
    with file.open("w") as stacks:
        for process in processes:
            words = [command, "dump", "--nonblocking", "--pid", str(process.pid)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(words, stdout=stacks, stderr=subprocess.STDOUT, timeout=STACKS_S, check=False)
