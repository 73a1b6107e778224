"""action=status: one run's state, address, processes and starts. Exit code 0 whatever the state."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import RUN_KEYS, Data, Page
from kt_launch.actions.runs import RUN_FIELDS, describe
from kt_launch.commandline.terminal import print_table, show_value
from kt_launch.machine.folders import runs_folder
from kt_launch.runs.runs import Run, find_run

PAGE = Page(
    ("Shows the state of one run: address, processes, metrics, and how each of its starts ended.",),
    (("kt-launch status", "the latest running one"), ("kt-launch status RUN", "this one")),
    (*RUN_KEYS, "format"),
    data=Data(
        "one object",
        (
            *RUN_FIELDS,
            ("log", "file of the server's log"),
            ("detached", "whether it was started with detach=true"),
            ("launcher_pid", "null once it has ended"),
            ("server_pid", "null once it has ended"),
            ("metrics_url", "address of its metrics, or null"),
            ("playground_url", "address of its page, with the page's token, or null"),
            ("attempts", "its starts: started_at and ended_at (seconds since 1970), ready_after_s, ending, cause"),
        ),
    ),
)


def run(job: Job) -> None:
    job.problems.raise_if_any()
    found = status_of(find_run(runs_folder(job.config.paths.runs), job.config.run, living=True))
    if job.wants_json:
        job.print_json(found)
    else:
        attempts = found.pop("attempts")
        found["adapters"] = ", ".join(found["adapters"]) or None
        rows = [(key, show_value(value)) for key, value in found.items()]
        rows += [(f"start {number}", _sentence(attempt)) for number, attempt in enumerate(attempts, 1)]
        print_table(("what", "value"), rows)


def status_of(run: Run) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    found, record = describe(run), run.record
    found["log"] = str(run.folder / "server.log")
    found["detached"] = record.detached if record else None
    found["launcher_pid"] = record.launcher.pid if record and record.launcher.alive else None
    found["server_pid"] = record.server.pid if record and record.server and record.server.alive else None
    found["metrics_url"] = record.metrics_url if record and record.lives else None
    found["playground_url"] = record.playground_url if record and record.lives else None
    found["attempts"] = [asdict(attempt) for attempt in record.attempts] if record else []
    return found


def _sentence(attempt: dict[str, Any]) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["started_at"]))
    ready = f", ready after {attempt['ready_after_s']:g} s" if attempt["ready_after_s"] is not None else ""
    ended = f", {attempt['ending']}" if attempt["ending"] else ""
    cause = f": {attempt['cause']}" if attempt["cause"] else ""
    return f"{began}{ready}{ended}{cause}"
