"""action=adapters: lists, loads and unloads the adapters of a running server; behind a router, on all servers or on
none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from kt_launch.actions import Job
from kt_launch.actions.page import RUN_KEYS, Data, Page
from kt_launch.cluster.adapters import Change, Worker, connected, load, read_all, unload
from kt_launch.commandline.terminal import print_table
from kt_launch.config.schema import Config
from kt_launch.machine.folders import runs_folder
from kt_launch.runs.runs import find_run, read_plan, require_ready, servers_of
from kt_launch.watching.client import Keys, keys_at, server_url, without_own_key
from kt_model.errors import EXIT_NOT_STARTED, EXIT_OK, LaunchError
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say
from kt_model.user_paths import absolute

PAGE = Page(
    (
        "Lists the adapters of a running server, loads and unloads them: of the latest run that is running, of the one "
        "that run= names, or of the address of adapters.url, which may be that of SGLang's router. Each server checks "
        "and proves an adapter as for /load_lora_adapter.",
        "Several servers behind a router all have an adapter or none: where one of them refuses it, the others "
        "give it back, and the line says who has it and why not. Loading what some have already gives it to the rest. "
        "A replica that starts again has the adapters that it had.",
        "The key comes from the run's own server.api_key and server.admin_key, or, for adapters.url, from those given "
        "here. A run with server.api_key alone made up a key for changes, which nobody else knows: start it with "
        "server.admin_key.",
    ),
    (
        ("kt-launch adapters", "which there are"),
        ("kt-launch adapters adapters.load.west=/adapters/west run=RUN", "one more"),
        ("kt-launch adapters adapters.unload=[west] run=RUN", "one less"),
        ("kt-launch adapters adapters.url=http://127.0.0.1:30000", "of the servers behind a router"),
    ),
    ("adapters.", "server.api_key", "server.admin_key", *RUN_KEYS, "format"),
    data=Data(
        "a list with an object for each adapter",
        (
            ("name", "how requests reach it"),
            ("path", "its folder"),
            ("servers", "addresses of the servers that have it"),
            ("lacking", "addresses of those that do not"),
        ),
    ),
)


def run(job: Job) -> int:
    job.problems.raise_if_any()
    wanted = job.config.adapters
    folders = {name: _folder(name, path, wanted.url) for name, path in wanted.load.items()}
    with _workers(job.config) as workers:
        changes = [unload(workers, name) for name in wanted.unload]
        changes += [load(workers, name, path) for name, path in folders.items()]
        _tell(changes)
        _show(job, read_all(workers))
    return EXIT_OK if all(change.success for change in changes) else EXIT_NOT_STARTED


def _folder(name: str, typed: str, url: str | None) -> str:
    """The typed folder without reference to the working folder, which the server has another of. Raises LaunchError if
    it is on machines where it cannot be completed."""
    if not url:
        return str(absolute(typed))
    if not Path(typed).is_absolute():
        fix = f"Set adapters.load.{name}=/path/to/folder, as it is called there."
        raise LaunchError(f"adapters.load.{name}", f"{typed} is relative, but the servers are at {printable(url)}", fix)
    return typed


def _tell(changes: Sequence[Change]) -> None:
    for change in changes:
        if not change.success:
            say(f"error: adapters: {change.message}", file=sys.stderr)


def _show(job: Job, has: dict[str, dict[str, str]]) -> None:
    paths = {name: path for names in has.values() for name, path in names.items()}
    found = [
        {
            "name": name,
            "path": path,
            "servers": [url for url, names in has.items() if name in names],
            "lacking": [url for url, names in has.items() if name not in names],
        }
        for name, path in paths.items()
    ]
    if job.wants_json:
        job.print_json(found)
    elif not found:
        say(f"no adapters on {', '.join(has)}")
    else:
        rows = [(str(one["name"]), str(one["path"]), _where(one["servers"], len(has))) for one in found]
        print_table(("adapter", "path", "servers"), rows)


def _where(servers: Any, count: int) -> str:
    return ("all" if count > 1 else servers[0]) if len(servers) == count else f"only {', '.join(servers)}"


def _workers(config: Config) -> AbstractContextManager[list[Worker]]:
    """The servers to act on. Raises LaunchError."""
    if config.adapters.url:
        keys = keys_at(config.server.api_key, config.server.admin_key)
        return connected(_behind(config.adapters.url, keys), keys)
    run = require_ready(find_run(runs_folder(config.paths.runs), config.run, living=True))
    plans = [read_plan(part) for part in servers_of(run)]
    changes = bool(config.adapters.load or config.adapters.unload)
    return connected([server_url(plan) for plan in plans], _keys_of(plans[0], changes))


def _keys_of(plan: LaunchPlan, changes: bool) -> Keys:
    words = without_own_key(plan.argv)
    if changes and len(words) < len(plan.argv):
        problem = "only this run's launcher knows the key for changes, which it made up"
        raise LaunchError("adapters", problem, "Start the server with server.admin_key=env:NAME too.")
    keys = Keys(words)
    if changes:
        _ = keys.admin_key  # raises before anything is changed
    return keys


def _behind(url: str, keys: Keys) -> list[str]:
    """The servers behind a router, or the one at this address."""
    if not url.startswith(("http://", "https://")):
        problem = f"{printable(url)} is not an address, expected http:// or https:// and a host"
        raise LaunchError("adapters.url", problem, "Set adapters.url=http://127.0.0.1:30000.")
    try:
        answer = _ask_servers(url, keys.key)
        if answer.status_code == httpx.codes.UNAUTHORIZED and keys.admin_key:  # a router's; a server asks for the other
            answer = _ask_servers(url, keys.admin_key)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return [url]
        return [str(worker["url"]) for worker in answer.raise_for_status().json()["workers"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as failure:
        problem = f"no server answers at {printable(url)} ({printable(str(failure).splitlines()[0])})"
        fix = "Give its address, server.api_key if it requires a key, and server.admin_key for a router."
        raise LaunchError("adapters.url", problem, fix) from failure


def _ask_servers(url: str, key: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{url.rstrip('/')}/workers", timeout=10.0, trust_env=False, headers=headers)
