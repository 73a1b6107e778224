"""A launcher in a child process, for a caller that carries on in the meantime: a bench, a notebook.

`python -m kt_launch.running.child_launcher <run folder> <parent pid>` is that process; ChildLauncher is the caller's
handle on it. It ends with the caller, however the caller ends. Signals from a terminal do not reach it: the caller
receives them and decides.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from kt_launch.machine.processes import stop
from kt_launch.running.exit_codes import exit_code_of
from kt_launch.watching.ready_lines import LABELS
from kt_model.errors import EXIT_NOT_STARTED, EXIT_PROOF_FAILED, LaunchError, ProofFailed, ServerDidNotStart
from kt_model.jsonfile import read_json_or_empty, write_json

STOP_S = 60.0
FOLLOW_S = 0.5
FAILURE_FILE = "failure.json"
READY = "ready: "
KINDS: dict[int, type[LaunchError]] = {EXIT_NOT_STARTED: ServerDidNotStart, EXIT_PROOF_FAILED: ProofFailed}

Told = Callable[[str], object]


class ChildLauncher:
    """The launcher of a recorded run. start() returns when its server is proven; stop() may be called repeatedly."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self.url = ""
        self.start_s = 0.0

    def start(self, out: Told, err: Told | None = None) -> None:
        """Start it and wait until it is ready. Its output goes to `out` and `err` (without `err`, stderr is inherited),
        from threads once it is ready. Raises the LaunchError that ended the launcher."""
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kt_launch.running.child_launcher", str(self._folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if err is None else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self.process.stdout is not None
        try:
            if err is not None and self.process.stderr is not None:
                _relay(self.process.stderr, err)
            self.url = _read_url(self.process.stdout, out)
        except BaseException:
            self.stop()
            raise
        if not self.url:
            self.process.wait()
            raise self._failure()
        self.start_s = round(time.monotonic() - began, 2)
        _relay(self.process.stdout, out)

    def stop(self) -> None:
        """End the server and its launcher, and wait for both."""
        stop(self.process, STOP_S)

    def _failure(self) -> LaunchError:
        record = read_json_or_empty(self._folder / FAILURE_FILE)
        if not record:
            problem = f"the process that starts it exited with code {self.process.returncode}"
            return ServerDidNotStart("server", problem, f"see {self._folder}")
        failure = KINDS.get(record["exit_code"], LaunchError)(record["where"], record["problem"], record["fix"])
        failure.exit_code = record["exit_code"]
        return failure


def _read_url(lines: IO[str], out: Told) -> str:
    """The address in the launcher's ready line, once all its ready lines are read (a part of a server on another host
    prints only that one); '' if it ends without one."""
    url = ""
    for line in lines:
        out(line)
        if line.startswith(READY):
            url = line.removeprefix(READY).strip()
        if url and (line.startswith(LABELS[-1]) or not url.startswith("http")):
            break
    return url


def _relay(lines: IO[str], told: Told) -> None:
    def relay() -> None:
        for line in lines:
            with contextlib.suppress(OSError, ValueError):  # the listener is gone
                told(line)

    threading.Thread(target=relay, daemon=True).start()


def watch_parent(parent: int) -> None:
    """Send SIGTERM to this process once its parent ends. The kernel's own signal (parent_death.py) would come when the
    parent's *thread* ends, and in a notebook or an application any thread may have started it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(FOLLOW_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(run_folder: Path, parent: int) -> int:
    """Serve until stopped; a LaunchError is printed on stderr and recorded for the caller."""
    from kt_launch.running.launch import serve_plan
    from kt_model.plan import LaunchPlan

    watch_parent(parent)
    return exit_code_of(
        lambda: serve_plan(LaunchPlan.read(run_folder / "plan.json"), run_folder),
        lambda failure: _write_failure(run_folder, failure),
    )


def _write_failure(run_folder: Path, failure: LaunchError) -> None:
    record = {"where": failure.where, "problem": failure.problem, "fix": failure.fix}
    write_json(run_folder / FAILURE_FILE, {**record, "exit_code": failure.exit_code})


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
