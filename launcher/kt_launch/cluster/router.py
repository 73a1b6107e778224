"""SGLang's own router (the package sglang-router) in front of several servers, in a child process: `python -P -m
kt_launch.cluster.router` reads its arguments from the environment, since one may be a key.

A request goes to the server that has most of its prompt cached, unless others have much less to do. Servers that do not
answer as proven (or healthy, if they have no proof) get no requests until they do again.

Who may ask may not choose the servers: the router's own routes for that need the admin key, or, if there is none, one
that the launcher makes up. Scripts of web pages may ask only from configured origins.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from kt_launch.machine.host import LOOPBACK
from kt_launch.machine.ports import listens, port_owner, probe_port
from kt_launch.machine.processes import end_session, session_processes, start_session
from kt_launch.watching.client import ALONE, Keys, another_answers, url_of, without_proxy
from kt_model.contract import PROVEN_ROUTE, ROUTING
from kt_model.errors import ServerDidNotStart
from kt_model.parent_death import die_with_parent

LOG = "router.log"
HEALTH_S = 2
"""Interval of the servers' health checks."""
START_S = 120.0
POLL_S = 0.2
WATCH_S = 0.5
HEALTH = "/health"
SERVERS = "/workers"
"""Lists the servers, and takes others."""
MOST_BYTES = 64 << 20
"""Largest body of a request, as the servers have it."""
OPEN = "the router tells the base model's name (/v1/models) and the number of servers to anybody, also without the key"


class Router:
    """The running router, from `with` to its end."""

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        workers: Sequence[str],
        keys: Keys,
        metrics_port: int | None,
        origins: Sequence[str] = (),
        health: str = PROVEN_ROUTE,
    ) -> None:
        """keys: of the servers; its clients need the same. metrics_port: of the router's own metrics, which it always
        serves; if None, on a free port of the loopback. origins: of web pages whose scripts may ask. health: the path
        on which a server says that it may get requests."""
        self.url, self._host, self._port = url_of(host, port), host, port
        self.log_file = folder / LOG
        own_key = keys.admin_key or secrets.token_urlsafe(32)
        self._arguments: dict[str, Any] = {
            "host": host,
            "port": port,
            "worker_urls": list(workers),
            "policy": "cache_aware",
            "api_key": keys.key,
            "control_plane_api_keys": [("launcher", "launcher", own_key, "admin")],
            "cors_allowed_origins": [*origins] or [self.url],  # an empty list would allow all
            "max_payload_size": MOST_BYTES,
            "health_check_endpoint": health,
            "health_check_interval_secs": HEALTH_S,
            "health_failure_threshold": 1,
            "health_success_threshold": 1,
            "prometheus_host": LOOPBACK if metrics_port is None else host,
            "prometheus_port": metrics_port or probe_port(LOOPBACK, 0).number,
            "log_level": "warn",
        }
        headers = {"Authorization": f"Bearer {own_key}"}
        self._client = httpx.Client(base_url=self.url, timeout=10.0, trust_env=False, headers=headers, limits=ALONE)

    def __enter__(self) -> Self:
        direct = without_proxy(os.environ, [self.url, *self._arguments["worker_urls"]])
        environment = {**os.environ, **direct, ROUTING: json.dumps({"parent": os.getpid(), **self._arguments})}
        command = [sys.executable, "-P", "-m", "kt_launch.cluster.router"]
        self._process = start_session(command, self.log_file, environment)
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        end_session(self.pid)
        self._process.wait()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_ready(self, count: int) -> None:
        """Wait until it considers so many servers healthy. Raises ServerDidNotStart."""
        deadline = time.monotonic() + START_S
        while self.healthy() < count:
            if self.ended or time.monotonic() > deadline:
                self._require_own_port()
                problem = f"the router {'ended' if self.ended else f'was not ready after {START_S:g} s'}"
                raise ServerDidNotStart("router", problem, f"Its log is {self.log_file}.")
            time.sleep(POLL_S)
        self._require_own_port()

    def _require_own_port(self) -> None:
        """Raise ServerDidNotStart if another process than the router listens on its port."""
        if listens((each.pid for each in session_processes(self.pid)), self._host, self._port) is False:
            raise another_answers(self.url, port_owner(self._port))

    def watch(self, count: int, changed: Callable[[int], None], none_left: Callable[[], bool] = lambda: False) -> None:
        """Wait until it has ended, or no server is left that could come back; calls `changed` with the number of
        healthy servers."""
        healthy = count
        while not (self.ended or none_left()):
            time.sleep(WATCH_S)
            if (now := self.healthy()) != healthy:
                healthy = now
                changed(now)

    def healthy(self) -> int:
        """The number of servers that it sends requests to at this moment."""
        try:
            workers = self._client.get(SERVERS).raise_for_status().json()["workers"]
        except (httpx.HTTPError, ValueError, KeyError):
            return 0
        return sum(bool(worker["is_healthy"]) for worker in workers)


def main() -> None:
    """The router's process, without sglang_router.launch_router, which imports all of SGLang for a balancer in Python
    that we do not use: five seconds and half a gigabyte."""
    arguments: dict[str, Any] = json.loads(os.environ.pop(ROUTING))
    die_with_parent(arguments.pop("parent"))
    package = "sglang_router.router"
    router, given = importlib.import_module(package), importlib.import_module(f"{package}_args")
    router.Router.from_args(given.RouterArgs(**arguments)).start()


if __name__ == "__main__":
    main()
