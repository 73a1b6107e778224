"""Run folders: one per serve, named by time and model, holding its plan, lock, logs and proof."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_launch.machine.folders import runs_folder
from kt_launch.runs.lock import read_recorded
from kt_launch.runs.state import ENDED, LOST, READY, RESTARTING, STARTING, UNRESPONSIVE, State, read_state
from kt_model.errors import LaunchError, command
from kt_model.jsonfile import read_json_or_empty
from kt_model.methods import short_name
from kt_model.nearest import did_you_mean
from kt_model.plan import LaunchPlan, adapter_names
from kt_model.user_paths import expanded

LATEST = "latest"
NOT_READY = {
    STARTING: ("is still starting", "{status} says when it is ready."),
    RESTARTING: ("is being started again", "{status} says when it is ready."),
    UNRESPONSIVE: ("has not answered for a while", "{logs} shows why."),
    ENDED: ("has ended", "Type {replay} to start it again."),
    LOST: ("has ended: its launcher is gone", "Type {replay} to start it again."),
}
"""What a run does in place of answering, and what to type then."""
NEVER_STARTED = ("never started a server", "Type {replay} to start it.")


@dataclass(frozen=True)
class Run:
    """A recorded run as read from its folder; files that the run never wrote are empty here."""

    folder: Path
    plan: dict[str, Any]
    timings: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def model(self) -> str:
        return str(self._value("model.name"))

    @property
    def method(self) -> str:
        return str(short_name(self._value("kt.method")))

    @property
    def adapters(self) -> list[str]:
        return sorted(adapter_names(self._resolved))

    @functools.cached_property
    def lock(self) -> dict[str, Any]:
        """What it was started from. Raises LaunchError if its lock.json is damaged."""
        return read_recorded(self.folder)

    @functools.cached_property
    def record(self) -> State | None:
        """What the run recorded about itself; None if no server was started."""
        return read_state(self.folder)

    @property
    def state(self) -> str:
        """starting, ready, restarting, ended, lost (its launcher ended without recording it), or not started."""
        return self.record.now if self.record else "not started"

    @property
    def lives(self) -> bool:
        return self.record is not None and self.record.lives

    @property
    def url(self) -> str:
        return self.record.url if self.record and self.record.now == READY else ""

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        if self.record is None or self.record.exit_code is None:
            return ""
        cause = self.record.error or (self.record.attempts[-1].cause if self.record.attempts else "")
        return f"exit code {self.record.exit_code}{f': {cause}' if cause else ''}"

    def _value(self, key: str) -> Any:
        item = self._resolved.get(key)
        return item.get("value", "?") if isinstance(item, dict) else "?"

    @property
    def _resolved(self) -> dict[str, Any]:
        """Empty if the plan is damaged."""
        found = self.plan.get("resolved")
        return found if isinstance(found, dict) else {}


def create_run_folder(root: str | None, model: str) -> Path:
    """A new, empty folder for one run, readable by its owner only."""
    parent = runs_folder(root)
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9._-]', '-', model)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
            try:
                (parent / name).mkdir(mode=0o700)
                return parent / name
            except FileExistsError:
                continue
    except OSError as failure:
        problem = f"cannot create a run folder in {parent} ({failure.strerror})"
        fix = "Set paths.runs=/a/folder/you/can/write, or set KT_LAUNCH_RUNS."
        raise LaunchError("paths.runs", problem, fix) from failure
    raise LaunchError("paths.runs", f"{parent} already has too many runs with this time in their names", "Try again.")


def read_runs(folder: Path) -> list[Run]:
    """All runs recorded in a folder, oldest first."""
    return [read_run(found) for *_, found in sorted(_recorded(folder))]


def _recorded(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """When each run was planned, its name and folder; one that is being made or removed is none."""
    for plan in folder.glob("*/plan.json"):
        with contextlib.suppress(FileNotFoundError):
            yield plan.stat().st_mtime_ns, plan.parent.name, plan.parent


def read_run(folder: Path) -> Run:
    """One run by its folder."""
    return Run(folder, *(read_json_or_empty(folder / name) for name in ("plan.json", "timings.json")))


def servers_of(run: Run) -> list[Run]:
    """The replicas of a run, each a run of its own; or the run itself."""
    folders = sorted(run.folder.glob("replica-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return [read_run(folder) for folder in folders] or [run]


def read_plan(run: Run) -> LaunchPlan:
    """The plan it was started from. Raises LaunchError if its plan.json is damaged."""
    file = run.folder / "plan.json"
    try:
        return LaunchPlan.read(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as failure:
        raise LaunchError("run", f"{file} is damaged: it holds no plan", "Choose another run.") from failure


def find_run(root: Path, name: str | None, living: bool = False) -> Run:
    """A run by its folder or by its name; without a name (or with `latest`), the latest one.

    living: prefer runs that are still alive over those that have ended.
    """
    if not name or name == LATEST:
        runs = read_runs(root)
        if not runs:
            raise LaunchError("run", f"no runs in {root}", "Set run=/path/to/folder, or paths.runs=/where/runs/are.")
        return next((run for run in reversed(runs) if living and run.lives), runs[-1])
    for folder in (root / name, expanded(name).absolute()):
        if (folder / "plan.json").is_file():
            return read_run(folder)
    fix = did_you_mean(name, [run.name for run in read_runs(root)], "kt-launch runs lists them.")
    raise LaunchError("run", f"no run {name} in {root}", fix)


def run_word(folder: Path) -> str:
    """The run as a word: run=, and its name if it is in the default runs folder, else its path."""
    return f"run={folder.name if folder.parent == runs_folder(None) else folder}"


def require_ready(run: Run) -> Run:
    """The run, if its server answers. Raises LaunchError that says what it does instead, and what to type."""
    if run.state == READY:
        return run
    problem, fix = NOT_READY.get(run.state, NEVER_STARTED)
    cause = f" ({run.ending})" if run.ending else ""
    commands = {action: command(action, run_word(run.folder)) for action in ("status", "logs", "replay")}
    raise LaunchError("run", f"{run.name} {problem}{cause}", fix.format(**commands))
