"""action=runs: the recorded runs, oldest first, with their states."""

from __future__ import annotations

from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.commandline.terminal import print_table
from kt_launch.machine.folders import runs_folder
from kt_launch.runs.runs import Run, read_runs
from kt_model.printable import say

RUN_FIELDS = (
    ("name", "of its folder"),
    ("folder", "of the run"),
    ("state", "as kt-launch status has it"),
    ("model", "name of the model"),
    ("adapters", "names of the adapters"),
    ("method", "number format of the experts"),
    ("start_s", "seconds until it was ready, or null"),
    ("url", "its address, or null"),
    ("restarts", "how often it was restarted"),
    ("exit_code", "null while it runs"),
    ("ending", "how it ended, or null"),
)
"""A run's fields in JSON."""

PAGE = Page(
    ("Lists the recorded runs, oldest first: state, model, adapters, method, seconds to ready, address, ending.",),
    (("kt-launch runs", ""), ("kt-launch runs --json", "for programs")),
    ("paths.runs", "format"),
    data=Data("a list with an object for each run", RUN_FIELDS),
)


def run(job: Job) -> None:
    job.problems.raise_if_any()
    folder = runs_folder(job.config.paths.runs)
    runs = [describe(run) for run in read_runs(folder)]
    if job.wants_json:
        job.print_json(runs)
    elif not runs:
        say(f"no runs in {folder}")
    else:
        columns = ("name", "state", "model", "adapters", "method", "start_s", "url", "ending")
        print_table(columns, [[_cell(run[column]) for column in columns] for run in runs])
        say(f"\nin {folder}")


def describe(run: Run) -> dict[str, Any]:
    """One run as plain values; what it never recorded is None."""
    record = run.record
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "model": run.model,
        "adapters": run.adapters,
        "method": run.method,
        "start_s": run.timings.get("ready"),
        "url": run.url or None,
        "restarts": record.restarts if record else 0,
        "exit_code": record.exit_code if record else None,
        "ending": run.ending or None,
    }


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
