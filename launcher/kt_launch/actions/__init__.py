"""What kt-launch can do: one module per action, each with `run(job)`, which returns an exit code if it may be another
than 0. A new action is a file here and a row in config/actions.py.

Modules are imported only when their action runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from kt_launch.config.actions import check_action
from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_model.errors import EXIT_OK, Problems
from kt_model.printable import readable_json


@dataclass
class Job:
    """One launch: the config, where its values came from, the mistakes found so far, and the record that it leaves."""

    config: Config
    sources: Sources
    problems: Problems
    overrides: list[str] = field(default_factory=list)
    number: int | None = None
    """Its place in a multirun, or None."""
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def wants_json(self) -> bool:
        return self.config.format == "json"

    def print_json(self, content: Any) -> None:
        """Print one value alone on stdout; in a multirun on one line."""
        print(readable_json(content, 2 if self.number is None else None), flush=True)


def run_action(job: Job) -> int:
    """Run the job's action."""
    name = job.config.action.name
    check_action(name)
    action = importlib.import_module(f"kt_launch.actions.{name}")
    if job.wants_json and action.PAGE.data is None:
        job.problems.add("format", f"kt-launch {name} prints nothing that JSON would hold", "Leave --json out.")
    exit_code: int | None = action.run(job)
    return exit_code or EXIT_OK
