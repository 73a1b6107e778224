"""What kt-launch can do, one module each with `run(job) -> exit code`. A new action is a file here and a row below.

Modules are imported only when their action runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kt_launch.config import Config
from kt_launch.errors import LaunchError, Problems
from kt_launch.nearest import nearest_name
from kt_launch.sources import Sources

ACTIONS: Mapping[str, str] = {
    "serve": "start the server, prove it, and keep it running (default)",
    "plan": "show what serve would start, and why; starts nothing",
    "inspect": "show what the chosen adapters are: format, ranks, scales, layers, experts; starts nothing",
    "quantize": "make the folder of int8 or int4 experts that kt.method=AMXINT8_SFT or AMXINT4_SFT is served from",
    "merge": "write the checkpoint with the chosen adapter baked in, to merge.path",
    "cache": "packed and quantized experts in the cache folder: cache.do=list, verify or prune",
    "bench": "measure speed, memory, start and quality as a client meets them; with -m, a sweep and its report",
    "explain": "one key with key=<key>, or all: value, source, the rule behind it, what would change it",
    "doctor": "check the installation and this machine, each finding with what to do",
    "schema": "print the config's JSON schema, for editors",
    "runs": "list the recorded runs",
    "status": "how a run fares: run=<name or folder>, the latest living one when not given",
    "logs": "the log of a run's server; logs.follow=true goes on",
    "stop": "end a run and every process of it",
    "replay": "repeat a run with the same command and environment, and say what differs today",
    "export": "a systemd unit, Dockerfile, compose file, Kubernetes manifest or Grafana dashboard for a launch",
    "diff": "what differs between two recorded runs: runs=[one,other]",
}


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


def check_action(name: str) -> None:
    """Raise LaunchError unless there is an action of that name."""
    if name not in ACTIONS:
        near = nearest_name(name, ACTIONS)
        raise LaunchError(
            "action",
            f"no action {name}",
            f"Did you mean action={near}?" if near else f"Choose from {', '.join(ACTIONS)}.",
        )


def run_action(job: Job) -> int:
    """Run the job's action."""
    name = job.config.action.name
    check_action(name)
    exit_code = importlib.import_module(f"kt_launch.actions.{name}").run(job)
    assert isinstance(exit_code, int)
    return exit_code
