"""From a plan to a run: creates its folder, records what it is made from, and starts it, in front or detached."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kt_launch.machine.host import read_host
from kt_launch.machine.processes import Stopped, ending_of, start_session, stopped_by
from kt_launch.running.exit_codes import exit_code_of
from kt_launch.runs.lock import plan_digest, read_quick_part, write_lock
from kt_launch.runs.runs import create_run_folder
from kt_launch.runs.state import READY, read_state
from kt_launch.watching.ready_lines import GAP, LABELS
from kt_model.errors import EXIT_INTERRUPTED, EXIT_OK, ServerDidNotStart
from kt_model.parent_death import die_with_parent
from kt_model.plan import LaunchPlan
from kt_model.printable import say, under_label

LAUNCHER_LOG = "launcher.log"
RESULTS = ("run:", "proof:", "metrics:", "adapters:", *LABELS, " " * GAP)
"""Prefixes of the launcher's lines that belong on stdout."""
POLL_S = 0.1


def record(
    plan: LaunchPlan, runs: str | None, typed: list[str], lock: Mapping[str, Any] | None = None
) -> tuple[LaunchPlan, Path]:
    """Write the plan and its lock (the given one, or the quick part) into a new run folder; returns both."""
    folder = create_run_folder(runs, plan.value("model.name"))
    placed = plan.placed_in(folder)
    try:
        placed.write(folder / "plan.json")
        known = read_quick_part(placed, read_host(), typed) if lock is None else lock
        write_lock({**known, **plan_digest(folder)}, folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)  # so that nobody takes it for a run
        raise
    return placed, folder


def start(plan: LaunchPlan, folder: Path, detach: bool, until_proven: bool = False) -> int:
    """Serve the recorded plan until it ends, or until it is proven; with detach, in a launcher process of its own."""
    for warning in plan.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    if detach:
        return start_detached(folder)
    return serve_plan(plan, folder, until_proven=until_proven)


def serve_plan(plan: LaunchPlan, folder: Path, *, detached: bool = False, until_proven: bool = False) -> int:
    """One server, or the replicas that the plan asks for. Returns and raises as server.serve does."""
    if "server.replicas" in plan.resolved:
        from kt_launch.cluster.replicas import serve_replicas

        return serve_replicas(plan, folder, detached=detached, until_proven=until_proven)
    from kt_launch.running.server import serve

    return serve(plan, folder, detached=detached, until_proven=until_proven)


def start_detached(folder: Path) -> int:
    """Start a launcher in a session of its own on a run folder. Returns when its server is ready, or the launcher's
    exit code. Raises ServerDidNotStart if it is killed before."""
    log_file = folder / LAUNCHER_LOG
    watcher = start_session([sys.executable, "-P", "-m", "kt_launch.running.launch", str(folder)], log_file)
    try:
        with stopped_by(signal.SIGINT, signal.SIGTERM), log_file.open(encoding="utf-8", errors="replace") as lines:
            while watcher.poll() is None and not _is_ready(folder):
                _relay(lines)
                time.sleep(POLL_S)
            _relay(lines)
    except Stopped:
        watcher.send_signal(signal.SIGTERM)
        watcher.wait()
        return EXIT_INTERRUPTED
    if watcher.returncode is not None and watcher.returncode < 0:
        ending = f"its launcher was {ending_of(watcher.returncode)} before it was ready"
        raise ServerDidNotStart("detach", ending, f"Its log is {log_file}")
    return watcher.returncode or EXIT_OK


def _is_ready(folder: Path) -> bool:
    state = read_state(folder)
    return state is not None and state.state == READY


def _relay(lines: Iterable[str]) -> None:
    for line in lines:
        stream = sys.stdout if line.startswith(RESULTS) else sys.stderr
        print(under_label(line, stream), end="", flush=True, file=stream)


def main(folder: Path) -> int:
    """A launcher process: the detached one, or a replica's."""
    return exit_code_of(lambda: serve_plan(LaunchPlan.read(folder / "plan.json"), folder, detached=True))


if __name__ == "__main__":
    os.umask(0o077)
    if parent := sys.argv[2:]:
        die_with_parent(int(parent[0]))
    sys.exit(main(Path(sys.argv[1])))
