"""Finds the server to chat with: an address, a recorded run that is ready, or one that is started for the chat."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence

import httpx

from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_launch.gathering.facts import prepare
from kt_launch.machine.folders import runs_folder
from kt_launch.planning.locate import locate_adapters, locate_model
from kt_launch.running.child_launcher import ChildLauncher
from kt_launch.running.launch import record
from kt_launch.runs.runs import Run, find_run, read_plan, read_runs, require_ready, servers_of
from kt_launch.runs.state import READY
from kt_launch.watching.client import ALONE, connect, keys_at
from kt_launch.watching.ready_lines import GAP
from kt_model.errors import LaunchError, Problems
from kt_model.nearest import did_you_mean
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say, under_label

ANSWER_S = 600.0
LAUNCHING = ("model", "lora", "kt", "server")
"""Keys that say what to start."""
HERE = ("127.0.0.1", "localhost", "[::1]")


def connected(
    config: Config, sources: Sources, problems: Problems, overrides: Sequence[str]
) -> contextlib.AbstractContextManager[httpx.Client]:
    """A client for the chosen server; one started for the chat ends with the block. Raises LaunchError."""
    if config.chat.url:
        return _of_address(config.chat.url, config.server.api_key)
    if run := _find_run(config, sources, problems, overrides):
        say(f"run: {run.folder}", file=sys.stderr)
        return connect(read_plan(_one_of(run)), ANSWER_S)
    return _started(config, sources, problems, overrides)


def _one_of(run: Run) -> Run:
    """With several replicas, one that is ready, since SGLang's router in front of them lists no adapters."""
    return next((server for server in servers_of(run) if server.state == READY), run)


def _of_address(url: str, key: str | None) -> httpx.Client:
    address = url.rstrip("/").removesuffix("/v1")
    if not address.startswith(("http://", "https://")):
        problem = f"{url} is not an address, expected http:// or https:// and a host"
        raise LaunchError("chat.url", problem, f"Set chat.url=http://{address}.")
    here = httpx.URL(address).host in HERE
    return httpx.Client(base_url=address, timeout=ANSWER_S, trust_env=not here, auth=keys_at(key), limits=ALONE)


def _find_run(config: Config, sources: Sources, problems: Problems, overrides: Sequence[str]) -> Run | None:
    """The named run, else the latest ready one; if a model was typed, one with that model and its adapters. Raises
    LaunchError if that run is not ready, or if nothing was typed while the only one that runs is not."""
    root = runs_folder(config.paths.runs)
    if config.run:
        return require_ready(find_run(root, config.run, living=True))
    living = [run for run in reversed(read_runs(root)) if run.lives]
    ready = [run for run in living if run.state == READY]
    if not any(word.lstrip("+").startswith(LAUNCHING) for word in overrides):
        return require_ready((ready or living)[0]) if living else None
    return next((run for run in ready if _is_of(run, config, sources, problems)), None)


def _is_of(run: Run, config: Config, sources: Sources, problems: Problems) -> bool:
    """Whether it serves the requested model and all requested adapters."""
    found = Problems()
    try:
        wanted = str(locate_model(config, sources, os.environ).path)
        adapters = {one.name: str(one.path) for one in locate_adapters(config, sources, os.environ, found)}
        plan = read_plan(run)
    except LaunchError:
        return False
    port = config.server.port
    same = plan.value("model.path") == wanted and (not port or plan.value("server.port") == port)
    return same and not found.errors and adapters.items() <= plan.adapters.items()


@contextlib.contextmanager
def _started(config: Config, sources: Sources, problems: Problems, overrides: Sequence[str]) -> Iterator[httpx.Client]:
    """A server of this chat's own; its launcher's output goes to stderr."""
    prepared = prepare(config, sources, problems)
    if config.chat.adapter:
        _require_adapter(config.chat.adapter, prepared)
    plan, folder = record(prepared, config.paths.runs, [*overrides])
    for warning in plan.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    say(f"no server is ready: starting {plan.value('model.name')}", file=sys.stderr)
    child, ready = ChildLauncher(folder), threading.Event()

    def tell(line: str) -> None:
        """Without the error that ends a start: start() raises it, and the command says it."""
        if ready.is_set() or not line.startswith("error: "):
            _tell(line)

    try:
        child.start(_tell, tell)
        ready.set()
        with connect(plan, ANSWER_S) as client:
            yield client
    finally:
        child.stop()


def _require_adapter(name: str, plan: LaunchPlan) -> None:
    """Checks, before a server is started, that it will have the adapter. Raises LaunchError."""
    base = plan.value("model.name")
    if name != base and name.removeprefix(f"{base}:") not in plan.adapters:
        other = f"Set chat.adapter={next(iter(plan.adapters))}." if plan.adapters else "Set lora=/path/to/folder."
        fix = did_you_mean(name, plan.adapters, other, "chat.adapter=")
        known = f"expected one of {', '.join(plan.adapters)}" if plan.adapters else "and none is chosen"
        raise LaunchError("chat.adapter", f"no adapter {name} in this launch, {known}", fix)


def _tell(line: str) -> None:
    if not line.startswith(("ready:", "ask:", "curl:", "chat:", "page:", "stop:", " " * GAP)):
        print(under_label(printable(line, "\n"), sys.stderr), end="", file=sys.stderr, flush=True)
