"""The actions by name, and what each does in a line; actions/ has a file for each."""

from __future__ import annotations

from collections.abc import Mapping

from kt_model.errors import LaunchError
from kt_model.nearest import nearest_name

ACTION = "action"
"""The group of presets whose choices they are."""

ACTIONS: Mapping[str, str] = {
    "serve": "start the server, prove it, and keep it running (default)",
    "plan": "show what serve would start, and why; starts nothing",
    "inspect": "show what the chosen adapters are: format, ranks, scales, layers, experts; starts nothing",
    "quantize": "make the folder of int8 or int4 experts that kt.method=int8 or int4 is served from",
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


def check_action(name: str) -> None:
    """Raise LaunchError unless there is an action of that name."""
    if name not in ACTIONS:
        near = nearest_name(name, ACTIONS)
        raise LaunchError(
            "action",
            f"no action {name}",
            f"Did you mean action={near}?" if near else f"Choose from {', '.join(ACTIONS)}.",
        )
