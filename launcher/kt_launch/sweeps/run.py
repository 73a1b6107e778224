"""A sweep from its first job to its report: its folder, the rows that already exist, and the exit code."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kt_launch.config.folder_presets import as_folders
from kt_launch.config.sources import as_typed
from kt_launch.machine.folders import runs_folder
from kt_launch.sweeps.folder import (
    FORMAT,
    INTERRUPTED,
    OK,
    SKIPPED,
    Row,
    SweepFolder,
    asked_of,
    choose_folder,
    state_of,
    sweeps_root,
)
from kt_launch.sweeps.summary import objective_of
from kt_model.errors import EXIT_CONFIGURATION, EXIT_OK, LaunchError, LaunchErrors, quoted
from kt_model.nearest import nearest_name
from kt_model.user_paths import expanded

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kt_launch.config.compose import Composer
    from kt_launch.config.schema import Config

RESUMED = "bench"
"""The only action whose finished jobs are not run again; plans are shown and servers started each time."""


def run_sweep(composer: Composer, overrides: list[str], job: Callable[[DictConfig], Any]) -> int:
    """All jobs, then the report; the exit code is that of the worst row."""
    config = read_settings(composer, overrides)
    typed = [as_folders(override) for override in overrides]
    folder = find_folder(config, typed)
    with folder.held():
        folder.begin(typed)
        _run_in(folder, composer, overrides, job)
        return _show(folder, quiet=config.format == "json")


def _run_in(folder: SweepFolder, composer: Composer, overrides: list[str], job: Callable[[DictConfig], Any]) -> None:
    if rows := folder.rows():
        print(f"sweep: continuing in {folder.path}: {len(rows)} rows exist already", file=sys.stderr)
    try:
        composer.multirun(overrides, job, folder.path)
    except KeyboardInterrupt:
        _show(folder)
        print(f"kt-launch: interrupted; the same command continues from here ({folder.path})", file=sys.stderr)
        raise
    except OSError as failure:  # Hydra's own files, whose names the error lacks on a full disk
        failure.filename = failure.filename or str(folder.path)
        raise
    except ValueError as failure:
        # Optuna's sweeper has no best trial if none succeeded; the rows say why.
        done = [row for row in folder.rows() if row["state"] == OK]
        for row in done[:1]:
            if row["objective"] is None:
                raise _no_objective(row) from failure
        if done or not folder.rows():
            raise
    if not folder.stopped:
        folder.done()


def _no_objective(row: Row) -> LaunchError:
    """The error of a search whose first finished job does not provide the number to optimize."""
    numbers = [name for name in {**row.get("resolved", {}), **(row.get("summary") or {})} if objective_of(row, name)]
    nearest = nearest_name(row["objective_name"], numbers)
    ways = [f"type kt-launch {RESUMED}"] if row["action"] != RESUMED else []
    ways.append(f"set {f'sweep.objective={nearest}' if nearest else 'another sweep.objective'}")
    return LaunchError(
        "sweep.objective",
        f"kt-launch {row['action']} leaves no number {quoted(row['objective_name'])}, and a search needs one a job",
        f"{ways[0][0].upper()}{', or '.join(ways)[1:]}.",
    )


def read_settings(composer: Composer, overrides: list[str]) -> Config:
    """The settings of the whole sweep: those that are not themselves swept."""
    from kt_launch.config.validation import validate

    config, mistakes = validate(composer.compose(composer.settled(overrides)).raw)
    if mistakes:
        raise LaunchErrors(mistakes)
    return config


def find_folder(config: Config, overrides: list[str]) -> SweepFolder:
    """The requested folder, that of an earlier attempt, or a new one."""
    sweep = config.sweep
    if sweep.folder:
        return SweepFolder(expanded(sweep.folder).absolute())
    resume = sweep.resume and config.action.name == RESUMED
    return choose_folder(sweeps_root(runs_folder(config.paths.runs)), overrides, resume, sweep.retry)


class SweepJob:
    """A job's place in its sweep: the row that exists already, or the one that it will leave."""

    def __init__(self, folder: Path, number: int, overrides: list[str], is_search: bool) -> None:
        self._folder = SweepFolder(folder)
        self._number = number
        self._is_search = is_search
        self._asked = asked_of(overrides)
        self._raw: dict[str, Any] = {}
        self._began = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def kept_row(self, raw: dict[str, Any]) -> Row | None:
        """A row that makes running this job unnecessary: its own from an earlier attempt, or a skipped row if the sweep
        was stopped."""
        self._raw = raw
        if self._folder.stopped:
            return self._finish({"exit_code": EXIT_OK, "state": SKIPPED, "error": "skipped after a failure"})
        found = self._folder.row(self._asked) if self._action == RESUMED else None
        if found is None or (self._setting("retry") and found["state"] != OK):
            return None
        print(f"job {self._number}: its row exists already ({found['state']})", file=sys.stderr)
        return self._finish({**found, "kept": True})

    def leave_row(self, record: dict[str, Any]) -> Row:
        """Write the row of a job that has run."""
        row = self._finish(record)
        self._folder.write_row(row, replace=self._action == RESUMED)
        fails = self._setting("fail_fast") and row["state"] not in (OK, INTERRUPTED)
        if fails or (self._is_search and row["state"] == OK and row["objective"] is None):
            self._folder.stop()
        return row

    def _finish(self, record: dict[str, Any]) -> Row:
        name = str(self._setting("objective"))
        ran = {"began": self._began, "host": platform.node(), "pid": os.getpid()}
        ran["slurm_job"] = os.environ.get("SLURM_JOB_ID")
        row = Row({"format": FORMAT, **ran, "action": self._action, **record})
        row.setdefault("state", state_of(int(record["exit_code"])))
        row.setdefault("error", None)
        row.update(number=self._number, overrides=self._asked)
        row.update(objective_name=name, objective=objective_of(row, name))
        return row

    @property
    def _action(self) -> Any:
        return self._raw.get("action", {}).get("name")

    def _setting(self, name: str) -> Any:
        return self._raw.get("sweep", {}).get(name)


def _show(folder: SweepFolder, quiet: bool = False) -> int:
    """Show the report (if quiet, only its path); returns the worst exit code."""
    from kt_launch.commandline.terminal import print_records
    from kt_launch.sweeps.report import show_report, write_report

    rows = folder.rows()
    if any(row.get("action") == RESUMED for row in rows):
        if not quiet:
            show_report(rows)
        print(f"report: {write_report(rows, folder.path)}", file=sys.stderr if quiet else None)
    else:
        print_records(rows)
    _show_best(folder.path / "optimization_results.yaml", sys.stderr if quiet else sys.stdout)
    return max((int(row["exit_code"]) for row in rows), default=EXIT_CONFIGURATION)


def _show_best(file: Path, output: TextIO) -> None:
    """The best result of an optimizing sweeper, as it recorded it; on stderr if stdout has JSON."""
    if file.is_file():
        import yaml

        found = yaml.safe_load(file.read_text())
        words = [as_typed(f"{name}={value}") for name, value in (found.get("best_params") or {}).items()]
        print(f"best: {shlex.join(words)} ({found.get('best_value')})", file=output)
