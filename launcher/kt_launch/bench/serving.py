"""A server for a bench: the launcher's own serve, with its proof, in a child process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx

from kt_launch.proving.proof import scheduler_reports
from kt_launch.running.child_launcher import ChildLauncher
from kt_launch.runs.state import read_state
from kt_launch.watching.client import connect
from kt_model.errors import ServerDidNotStart
from kt_model.jsonfile import read_json_or_empty
from kt_model.plan import LaunchPlan

ANSWER_S = 600.0
SETTLE_S = 30.0


class Served:
    """A proven server on the plan in `run_folder`, from `with` to its end. Raises LaunchError if it does not start."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self.plan = LaunchPlan.read(run_folder / "plan.json")
        self.url = ""
        self.start_s = 0.0

    def __enter__(self) -> Served:
        self._child = ChildLauncher(self._folder)
        self._child.start(out=lambda line: None)
        self.url, self.start_s, self.pid = self._child.url, self._child.start_s, self._child.process.pid
        self.client = connect(self.plan, ANSWER_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._child.stop()

    def require_alive(self, where: str) -> None:
        """Raises ServerDidNotStart if the server has ended."""
        if self._ended():
            state = read_state(self._folder)
            cause = state.attempts[-1].cause if state and state.attempts else None
            problem = f"the server ended while it was measured{': ' + cause if cause else ''}"
            raise ServerDidNotStart(where, problem, f"its log is {self._folder / 'server.log'}")

    def phases(self) -> dict[str, float]:
        """Seconds from the start to the beginning of each of its phases, as recorded by the launcher."""
        found = read_json_or_empty(self._folder / "timings.json")
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    def expert_bytes(self) -> int:
        """Memory of the routed experts in the kernels, over all scheduler processes."""
        return sum(layer["packed_bytes"] for report in scheduler_reports(self.client) for layer in report["layers"])

    def _ended(self) -> bool:
        """Also when the launcher is about to notice that its server is gone."""
        try:
            self._child.process.wait(SETTLE_S if self._refuses() else 0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _refuses(self) -> bool:
        try:
            self.client.get("/model_info", timeout=30.0)
        except httpx.TransportError:
            return True
        return False
