"""The actions by name, and what each does in one line; actions/ has a file for each."""

from __future__ import annotations

from collections.abc import Mapping

from kt_model.errors import LaunchError
from kt_model.nearest import did_you_mean

ACTION = "action"
"""The group whose choices they are."""

ACTIONS: Mapping[str, str] = {
    "serve": "start the server, prove it, and keep it running (default)",
    "chat": "talk to a running server in the terminal, or to one that is started for it",
    "plan": "show what serve would start, and why; starts nothing",
    "fit": "what models take of memory and how fast they are at most, by config.json alone; starts nothing",
    "inspect": "describe the chosen adapters: format, ranks, scales, layers, experts; starts nothing",
    "quantize": "write the folder of quantized experts that kt.method=int8 or int4 serves",
    "merge": "write the checkpoint with the chosen adapter merged into it, to merge.path",
    "cache": "list, verify or prune the packed and quantized experts in the cache folder",
    "bench": "measure speed, memory, start time and quality as a client sees them; with -m, a sweep with a report",
    "explain": "explain one key (kt-launch explain KEY) or all: value, source, rule behind it, what would change it",
    "doctor": "check the installation and this machine, and say what to do about each finding",
    "schema": "print the config's JSON schema, for editors",
    "config": "print the validated config as a file to keep, for kt-launch --config FILE",
    "runs": "list the recorded runs",
    "status": "state of a run, by name or folder (kt-launch status RUN); by default the latest one that is running",
    "logs": "show the log of a run's server; logs.follow=true follows it",
    "stop": "stop a run and all its processes",
    "route": "put SGLang's router in front of servers that run already: workers=[http://host:port,...]",
    "adapters": "list, load and unload the adapters of a running server, or of all servers behind a router",
    "replay": "repeat a run with the same command and environment, and report what differs today",
    "export": "write a systemd unit, Dockerfile, compose file, Kubernetes manifest or Grafana dashboard",
    "diff": "show what differs between two recorded runs: kt-launch diff ONE OTHER",
}

DEFAULT_ACTION = "serve"

OPERANDS: Mapping[str, str] = {
    **dict.fromkeys(("status", "logs", "stop", "replay", "chat", "adapters"), "run={}"),
    "explain": "key={}",
    "diff": "runs=[{}]",
}
"""For some actions, the key that words after the action's name belong to."""

PAGES: Mapping[str, str] = {
    "help": "the page of kt-launch --help; help ACTION shows that action's page",
    "version": "print the version",
}
"""Words that are typed like an action and show a page."""


def check_action(name: str, before: str = "kt-launch ") -> None:
    """Raise LaunchError unless there is an action of that name; `before` is what is typed before it."""
    if name not in ACTIONS:
        fix = did_you_mean(name, ACTIONS, f"Choose from {', '.join(ACTIONS)}.", before)
        raise LaunchError("action", f"no action {name}", fix)
