"""kt-launch route workers=[…]: SGLang's router in front of servers that already run, on this host or others."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress

import httpx

from kt_launch.actions import Job
from kt_launch.actions.page import Page
from kt_launch.cluster.adapters import Worker, connected, say_changed
from kt_launch.cluster.router import HEALTH, OPEN, Router
from kt_launch.config.schema import Server
from kt_launch.machine.folders import runs_folder
from kt_launch.machine.ports import held_ports, probe_port
from kt_launch.machine.processes import Stopped, stopped_by
from kt_launch.planning.access import is_loopback
from kt_launch.watching.client import Keys, keys_at
from kt_model.contract import PROVEN_ROUTE
from kt_model.errors import EXIT_INTERRUPTED, LaunchError, ServerDidNotStart
from kt_model.installed import ROUTER, requirement
from kt_model.printable import printable, say

PAGE = Page(
    (
        "Runs SGLang's router (the package sglang-router) in front of servers that were started elsewhere, on this "
        "host or on others. A request goes to the server that has most of its prompt cached, unless others have much "
        "less to do; a server that does not answer gets none until it does again, and is proven. All of them have to "
        "offer the same models and adapters. Servers of one host are started behind a router by server.replicas.",
        "server.api_key is where the key of all these servers is found; the router asks its clients for the same one, "
        "but tells the base model's name and the number of servers without it. Which servers there are is told and "
        "changed (/workers) only with server.admin_key; without one nobody but the launcher can.",
        "With server.adapters_port adapters are loaded into all of them at once, on a port of its own; a server that "
        "was away and lacks one is given it again. server.admin_key is where the servers' key for that is found.",
    ),
    (("kt-launch route workers=[http://host-a:30000,http://host-b:30000] server.port=30000", "two servers as one"),),
    (
        *("workers", "server.host", "server.port", "server.api_key", "server.admin_key", "server.metrics_port"),
        *("server.adapters_port", "server.open", "server.origins", "paths.runs"),
    ),
)


def run(job: Job) -> int:
    job.problems.raise_if_any()
    server, urls = job.config.server, job.config.workers
    if not urls:
        raise LaunchError("workers", "no servers given", "Set workers=[http://host-a:30000,http://host-b:30000].")
    if importlib.util.find_spec("sglang_router") is None:
        problem = f"the package {ROUTER} is not installed"
        raise LaunchError("workers", problem, f"Type: pip install {requirement(ROUTER)}")
    keys, port = keys_at(server.api_key, server.admin_key), probe_port(server.host, server.port)
    if not (is_loopback(server.host) or server.open or keys.key):
        problem = f"{server.host} is open to other machines, and no key is required"
        fix = "Set server.api_key=env:NAME, or server.open=true to let everyone in."
        raise LaunchError("server.host", problem, fix)
    if not port.free:
        raise LaunchError("server.port", f"{port.number} on {server.host} cannot be used: {port.owner}", "Set another.")
    names = _require_alike({url: _ask_names(url, keys.key) for url in urls})
    folder = runs_folder(job.config.paths.runs) / "routers" / str(port.number)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = {"server.port": port.number, "server.metrics_port": server.metrics_port}
    own["server.adapters_port"] = server.adapters_port
    listening = (server.host, port.number, urls, keys, server.metrics_port, server.origins, _health_path(urls))
    with stopped_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            with ExitStack() as stack:
                stack.enter_context(held_ports(server.host, own))
                workers = stack.enter_context(connected(urls, keys))
                router = stack.enter_context(Router(folder, *listening))
                router.wait_ready(len(urls))
                stack.enter_context(_adapters_port(server, workers, keys))
                say(f"ready: {router.url}")
                say(f"ask:   {', '.join(names)}")
                say(f"log:   {router.log_file}")
                if keys.key:
                    say(f"route: {OPEN}", file=sys.stderr)
                router.watch(len(urls), lambda healthy: say_changed("route", healthy, workers))
                raise ServerDidNotStart("workers", "the router ended unexpectedly", f"Its log is {router.log_file}.")
        except Stopped:
            return EXIT_INTERRUPTED


def _adapters_port(server: Server, workers: Sequence[Worker], keys: Keys) -> AbstractContextManager[object]:
    if server.adapters_port is None:
        return nullcontext()
    from kt_launch.cluster import adapters_port

    return adapters_port.served(server.host, server.adapters_port, workers, keys)


def _health_path(urls: Sequence[str]) -> str:
    """The health route for the router: the one that says proven, if all servers have it."""
    with suppress(httpx.HTTPError):
        asked = (httpx.get(f"{url.rstrip('/')}{PROVEN_ROUTE}", timeout=10.0, trust_env=False) for url in urls)
        if all(answer.is_success for answer in asked):
            return PROVEN_ROUTE
    return HEALTH


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
