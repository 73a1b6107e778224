"""action=route workers=[…]: SGLang's router in front of servers that run already, also on other hosts."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Mapping

import httpx

from kt_launch.actions import Job
from kt_launch.actions.page import Page
from kt_launch.machine.folders import runs_folder
from kt_launch.machine.host import probe_port
from kt_launch.machine.processes import Stopped, stopped_by
from kt_launch.running.router import Router
from kt_launch.watching.client import key_at
from kt_model.errors import EXIT_INTERRUPTED, LaunchError, ServerDidNotStart
from kt_model.installed import ROUTER, requirement
from kt_model.printable import printable, say

PAGE = Page(
    (
        "Runs SGLang's router (the package sglang-router) in front of servers that were started elsewhere, on this "
        "host or on others. A request goes to the server that has most of its prompt cached, unless others have much "
        "less to do; a server that does not answer /health gets none until it does again. All of them have to offer "
        "the same models and adapters. Servers of one host are started behind a router by server.replicas.",
        "server.api_key is where the key of all these servers is found; the router asks its clients for the same one, "
        "but lists the models without it.",
    ),
    (("kt-launch route workers=[http://host-a:30000,http://host-b:30000] server.port=30000", "two servers as one"),),
    ("workers", "server.host", "server.port", "server.api_key", "server.metrics_port", "paths.runs"),
)
POLL_S = 1.0


def run(job: Job) -> int:
    job.problems.raise_if_any()
    server, workers = job.config.server, job.config.workers
    if not workers:
        raise LaunchError("workers", "no servers given", "Set workers=[http://host-a:30000,http://host-b:30000].")
    if importlib.util.find_spec("sglang_router") is None:
        raise LaunchError(
            "workers", f"the package {ROUTER} is not installed", f"Type: pip install {requirement(ROUTER)}"
        )
    key, port = key_at(server.api_key), probe_port(server.host, server.port)
    if not port.free:
        raise LaunchError("server.port", f"{port.number} on {server.host} cannot be used: {port.owner}", "Set another.")
    names = _require_alike({url: _ask_names(url, key) for url in workers})
    folder = runs_folder(job.config.paths.runs) / "routers" / str(port.number)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with stopped_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            with Router(folder, server.host, port.number, workers, key, server.metrics_port) as router:
                router.wait_ready(len(workers))
                say(f"ready: {router.url}")
                say(f"ask:   {', '.join(names)}")
                say(f"log:   {router.log_file}")
                return _watch(router, len(workers))
        except Stopped:
            return EXIT_INTERRUPTED


def _watch(router: Router, count: int) -> int:
    healthy = count
    while not router.ended:
        time.sleep(POLL_S)
        if (now := router.healthy()) != healthy:
            healthy = now
            say(f"route: {healthy} of {count} servers answer", file=sys.stderr)
    raise ServerDidNotStart("workers", "the router ended unexpectedly", f"Its log is {router.log_file}.")


def _ask_names(url: str, key: str | None) -> list[str]:
    """Ids of the models and adapters that a server lists."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=10.0, trust_env=False)
        return sorted(str(model["id"]) for model in answer.raise_for_status().json()["data"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as failure:
        problem = f"no server answers at {printable(url)} ({printable(str(failure).splitlines()[0])})"
        raise LaunchError("workers", problem, "Start it there, or leave it out.") from failure


def _require_alike(names: Mapping[str, list[str]]) -> list[str]:
    first, *others = names.items()
    for url, found in others:
        if found != first[1]:
            problem = f"{first[0]} offers {', '.join(first[1])}, but {url} {', '.join(found)}"
            raise LaunchError("workers", printable(problem), "Serve the same model and adapters on all of them.")
    return first[1]
