"""A server for a bench: the launcher's own serve, with its proof, in a process of its own.

`python -m kt_launch.bench.serving <run folder> <parent>` is that process; Served is the bench's handle on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import httpx

from kt_launch.machine.processes import stop
from kt_launch.proving.proof import scheduler_reports
from kt_launch.running.client import connect
from kt_launch.running.state import read_state
from kt_model.errors import EXIT_NOT_STARTED, LaunchError, LaunchErrors, ServerDidNotStart
from kt_model.following import follow
from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.plan import LaunchPlan

STOP_S = 60.0
ANSWER_S = 600.0
SETTLE_S = 30.0
FAILURE_FILE = "failure.json"


class Served:
    """A proven server on the plan in `run_folder`, from `with` to its end. Raises LaunchError when it does not
    start."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self.plan = LaunchPlan.read(run_folder / "plan.json")
        self.url = ""
        self.start_s = 0.0

    def __enter__(self) -> Served:
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kt_launch.bench.serving", str(self._folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        try:
            self.url = _read_url(self._process.stdout)
        except BaseException:
            stop(self._process, STOP_S)
            raise
        if not self.url:
            self._process.wait()
            raise self._failure()
        self.start_s = round(time.monotonic() - began, 2)
        threading.Thread(target=_drain, args=(self._process.stdout,), daemon=True).start()
        self.client = connect(self.plan, ANSWER_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        stop(self._process, STOP_S)

    def require_alive(self, where: str) -> None:
        """Raises ServerDidNotStart when the server has ended."""
        if self._ended():
            state = read_state(self._folder)
            cause = state.attempts[-1].cause if state and state.attempts else None
            problem = f"the server ended while it was measured{': ' + cause if cause else ''}"
            raise ServerDidNotStart(where, problem, f"its log is {self._folder / 'server.log'}")

    def phases(self) -> dict[str, float]:
        """Seconds from the start to the beginning of each phase of it, as the launcher noted them."""
        found = read_json_or_empty(self._folder / "timings.json")
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def expert_bytes(self) -> int:
        """Memory of the routed experts as the kernels hold them, of all scheduler processes."""
        return sum(layer["packed_bytes"] for report in scheduler_reports(self.client) for layer in report["layers"])

    def _ended(self) -> bool:
        """Also when the launcher is about to notice that its server is gone."""
        try:
            self._process.wait(SETTLE_S if self._refuses() else 0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _refuses(self) -> bool:
        try:
            self.client.get("/model_info", timeout=30.0)
        except httpx.TransportError:
            return True
        return False

    def _failure(self) -> LaunchError:
        record = read_json_or_empty(self._folder / FAILURE_FILE)
        if not record:
            problem = f"the process that starts it exited with code {self._process.returncode}"
            return ServerDidNotStart("server", problem, f"see {self._folder}")
        failure = LaunchError(record["where"], record["problem"], record["fix"])
        failure.exit_code = record["exit_code"]
        return failure


def _read_url(lines: IO[str]) -> str:
    """The address that the launcher says is ready; '' when it ends without one."""
    for line in lines:
        if line.startswith("ready: "):
            return line.removeprefix("ready: ").strip()
    return ""


def _drain(lines: IO[str]) -> None:
    for _ in lines:
        pass


def main(run_folder: Path, parent: int) -> int:
    """Serve until stopped; a mistake is told on stderr and written down for the bench."""
    from kt_launch.commandline.terminal import print_mistakes
    from kt_launch.running.server import serve

    follow(parent)
    try:
        return serve(LaunchPlan.read(run_folder / "plan.json"), run_folder)
    except (LaunchError, LaunchErrors) as failure:
        print_mistakes(failure)
        first = failure.errors[0] if isinstance(failure, LaunchErrors) else failure
        _write_failure(run_folder, first)
        return failure.exit_code or EXIT_NOT_STARTED


def _write_failure(run_folder: Path, failure: LaunchError) -> None:
    record: dict[str, Any] = {"where": failure.where, "problem": failure.problem, "fix": failure.fix}
    write_json(run_folder / FAILURE_FILE, {**record, "exit_code": failure.exit_code})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
