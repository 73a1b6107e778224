"""What kt-launch can do, one module each with `run(job) -> exit code`. A new action is a
file here and a row in config/actions.py.

Modules are imported only when their action runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from kt_launch.config.actions import check_action
from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_model.errors import Problems


@dataclass
class Job:
    """One launch: the config, where its values came from, the mistakes found so far, and what it leaves behind."""

    config: Config
    sources: Sources
    problems: Problems
    overrides: list[str] = field(default_factory=list)
    number: int | None = None
    """Its place in a multirun, or None."""
    record: dict[str, Any] = field(default_factory=dict)


def run_action(job: Job) -> int:
    """Run the job's action."""
    name = job.config.action.name
    check_action(name)
    exit_code = importlib.import_module(f"kt_launch.actions.{name}").run(job)
    assert isinstance(exit_code, int)
    return exit_code
