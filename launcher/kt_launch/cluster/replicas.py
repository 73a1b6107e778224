"""Several servers of one plan on this host behind SGLang's router, each a run of its own with its own cores, GPUs,
launcher and proof. A replica that dies is restarted by its launcher while the others answer.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_launch.cluster.adapters import Worker, connected, say_changed
from kt_launch.cluster.router import OPEN, Router
from kt_launch.machine.host import LOOPBACK, read_host
from kt_launch.machine.ports import held_ports
from kt_launch.machine.processes import (
    Stopped,
    end_session,
    ending_of,
    in_foreground,
    session_processes,
    start_session,
    stopped_by,
)
from kt_launch.runs.lock import plan_digest, read_quick_part, write_lock
from kt_launch.runs.state import READY, RunStateWriter, read_state
from kt_launch.watching.client import Keys, server_url
from kt_launch.watching.ready_lines import ready_lines
from kt_model.contract import PROCESS_CPUS, SGLANG_CPUS
from kt_model.errors import EXIT_INTERRUPTED, EXIT_NOT_STARTED, LaunchError, ServerDidNotStart
from kt_model.plan import LaunchPlan, Resolved
from kt_model.printable import printable, say

LOG = "launcher.log"
RESTARTS = 3
"""Default for a replica: the others answer while one restarts."""
POLL_S = 0.5


def serve_replicas(plan: LaunchPlan, run_folder: Path, *, detached: bool = False, until_proven: bool = False) -> int:
    """Run all replicas and the router until interrupted, or until no replica is left; or only until all are proven.
    Each replica has a run folder of its own below this one. Returns and raises as server.serve does."""
    say(f"run: {run_folder}")
    state_writer = RunStateWriter(run_folder, server_url(plan), detached)
    with stopped_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            code = _run(plan, run_folder, state_writer, until_proven)
        except Stopped as stop:
            if stop.by_hand:
                print("kt-launch: interrupted, the servers are stopped", file=sys.stderr, flush=True)
            code = EXIT_INTERRUPTED
        except LaunchError as failure:
            state_writer.ended(failure.exit_code, str(failure))
            raise
    state_writer.ended(code)
    return code


def _run(plan: LaunchPlan, run_folder: Path, state_writer: RunStateWriter, until_proven: bool) -> int:
    keys, typed = Keys(list(plan.argv)), plan.config["server"]
    own = {f"server.{name}": typed.get(name) for name in ("metrics_port", "adapters_port")}
    with ExitStack() as stack:
        stack.enter_context(held_ports(typed["host"], {"server.port": plan.value("server.port"), **own}))
        replicas = [stack.enter_context(_started(part, folder)) for part, folder in write_parts(plan, run_folder)]
        for replica in replicas:
            replica.wait_proven()
        urls, server = [replica.url for replica in replicas], plan.config["server"]
        listening = (server["host"], plan.value("server.port"), urls, keys, server.get("metrics_port"))
        router = stack.enter_context(Router(run_folder, *listening, server.get("origins", ())))
        workers = stack.enter_context(connected(urls, keys))
        state_writer.starting(router.pid)
        router.wait_ready(len(replicas))
        say(f"replicas: {len(replicas)} servers behind SGLang's router: {', '.join(urls)}")
        if keys.key:
            say(f"replicas: {OPEN}", file=sys.stderr)
        if server.get("adapters_port") is not None:
            from kt_launch.cluster import adapters_port

            stack.enter_context(adapters_port.served(server["host"], int(server["adapters_port"]), workers, keys))
        page = replicas[0].playground_url
        for line in ready_lines(plan, run_folder, in_foreground(), page, log="replica-*/server.log"):
            say(line)
        state_writer.ready()  # a launcher waiting for a detached run relays the lines printed before this
        return 0 if until_proven else _watch(replicas, router, workers, state_writer)


def _watch(replicas: list[Replica], router: Router, workers: list[Worker], state_writer: RunStateWriter) -> int:
    """Until no replica or no router is left; reports changes."""
    told: set[Replica] = set()

    def none_left() -> bool:
        ended = {replica for replica in replicas if replica.ended}
        for replica in ended - told:
            say(f"kt-launch: {replica.ending}", file=sys.stderr)
        told.update(ended)
        return len(ended) == len(replicas)

    def changed(healthy: int) -> None:
        say_changed("replicas", healthy, workers)
        state_writer.answers(healthy > 0)

    router.watch(len(replicas), changed, none_left)
    if none_left():
        say("kt-launch: no replica is left", file=sys.stderr)
        state_writer.attempt_ended("no replica is left")
        return EXIT_NOT_STARTED
    state_writer.attempt_ended("the router ended")
    say(f"kt-launch: the router ended unexpectedly. Its log is {router.log_file}", file=sys.stderr)
    return EXIT_NOT_STARTED


class Replica:
    """One of the servers, represented by its launcher process."""

    def __init__(self, folder: Path, url: str, launcher: subprocess.Popen[bytes]) -> None:
        self.folder, self.url, self._launcher = folder, url, launcher

    @property
    def ended(self) -> bool:
        return self._launcher.poll() is not None

    @property
    def ending(self) -> str:
        """How it ended; only once it has."""
        how = ending_of(self._launcher.wait())
        return f"the launcher of {self.folder.name} ended ({how}): {self._last_words}"

    @property
    def playground_url(self) -> str | None:
        state = read_state(self.folder)
        return state.playground_url if state else None

    def wait_proven(self) -> None:
        """Raises ServerDidNotStart with the launcher's last line."""
        while (state := read_state(self.folder)) is None or state.state != READY:
            if self.ended:
                problem = f"{self.folder.name}: {self._last_words.removeprefix('error: ')}"
                raise ServerDidNotStart("server.replicas", problem, f"Its log is {self.folder / LOG}.")
            time.sleep(POLL_S)

    @property
    def _last_words(self) -> str:
        lines = (self.folder / LOG).read_text(errors="replace").splitlines()
        return printable(next((line.strip() for line in reversed(lines) if line.strip()), "ended without a word"))


@contextmanager
def _started(plan: LaunchPlan, folder: Path) -> Iterator[Replica]:
    """Starts a replica's own launcher, which ends with this process."""
    command = [sys.executable, "-P", "-m", "kt_launch.running.launch", str(folder), str(os.getpid())]
    launcher = start_session(command, folder / LOG)
    try:
        yield Replica(folder, server_url(plan), launcher)
    finally:
        launcher.terminate()
        launcher.wait()
        if session_processes(launcher.pid):
            end_session(launcher.pid)


def write_parts(plan: LaunchPlan, run_folder: Path) -> list[tuple[LaunchPlan, Path]]:
    """Write each replica's plan into its folder: with its own port and cores, without the router."""
    count = int(plan.config["server"]["replicas"])
    shares, devices = plan.value("server.processes"), plan.resolved.get("server.devices")
    each = len(shares) // count
    parts = []
    for number, port in enumerate(_free_ports(count)):
        folder = run_folder / f"replica-{number}"
        folder.mkdir(mode=0o700)
        part = _part(plan, port, shares[number * each : (number + 1) * each])
        if devices:
            chosen = ",".join(map(str, devices.value[number * each : (number + 1) * each]))
            part = replace(part, env={**part.env, "CUDA_VISIBLE_DEVICES": chosen})
        if number:  # one page for all, on the first replica, since the router lists no adapters
            server = {**part.config["server"], "playground_port": None}
            part = replace(part, config={**part.config, "server": server})
        part = part.placed_in(folder)
        part.write(folder / "plan.json")
        write_lock({**read_quick_part(part, read_host(), []), **plan_digest(folder)}, folder)
        parts.append((part, folder))
    return parts


def _part(plan: LaunchPlan, port: int, shares: list[str]) -> LaunchPlan:
    argv = [*plan.argv]
    for flag, value in (("--port", str(port)), ("--host", LOOPBACK)):
        argv[argv.index(flag) + 1] = value
    server = {**plan.config["server"], "replicas": 1, "port": port, "host": LOOPBACK, "metrics_port": None}
    if server["restarts"] is None:
        server["restarts"] = RESTARTS
    cpus = {name: "|".join(shares) for name in (PROCESS_CPUS, SGLANG_CPUS) if name in plan.env}
    of_all: dict[str, Any] = {"server.port": port, "server.host": LOOPBACK, "server.processes": shares}
    resolved = {name: each for name, each in plan.resolved.items() if name not in ("server.replicas", "server.devices")}
    resolved |= {name: Resolved(value, "derived: a replica of server.replicas") for name, value in of_all.items()}
    config = {**plan.config, "server": server}
    return replace(plan, argv=tuple(argv), env={**plan.env, **cpus}, resolved=resolved, config=config)


def _free_ports(count: int) -> list[int]:
    """Distinct ports, all reserved until the last is known."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in held]
