"""action=stop: ends a run, its launcher first, then whatever is left of its server. A pid that another process has by
now is left alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from kt_launch.actions import Job
from kt_launch.actions.page import RUN_KEYS, Data, Page
from kt_launch.machine.folders import runs_folder
from kt_launch.machine.process_identity import ProcessIdentity
from kt_launch.runs.runs import Run, find_run
from kt_launch.runs.scratch import remove_abandoned
from kt_launch.runs.state import ENDED, State, close_state
from kt_model.errors import LaunchError
from kt_model.printable import say

PAGE = Page(
    (
        "Stops a run: first its launcher, then whatever is left of its server. A process ID that now belongs to "
        "another program is left alone.",
    ),
    (("kt-launch stop", "the latest running one"), ("kt-launch stop RUN", "this one")),
    (*RUN_KEYS, "format"),
    data=Data("one object", (("name", "of the run"), ("outcome", "what was done, in a few words"))),
)

LAUNCHER_GRACE_S = 40.0
"""Longer than the launcher itself waits for its server."""
POLL_S = 0.1


def run(job: Job) -> None:
    job.problems.raise_if_any()
    found = find_run(runs_folder(job.config.paths.runs), job.config.run, living=True)
    if found.record is None:
        raise LaunchError("run", f"{found.name} never started a server", "kt-launch runs lists the runs.")
    outcome = stop(found, found.record)
    if job.wants_json:
        job.print_json({"name": found.name, "outcome": outcome})
    else:
        say(f"{found.name}: {outcome}")


def stop(run: Run, state: State) -> str:
    """End every process of the run; returns what was done, in a few words."""
    from kt_launch.machine.processes import end_session, session_processes

    ended = _end_launcher(state.launcher)
    left = _session(state.server)
    orphans = session_processes(left) if left else []
    if orphans:
        end_session(left)
    if state.state != ENDED and not ended:
        close_state(run.folder, "its launcher was gone")
        remove_abandoned()
    if ended:
        return "stopped"
    return f"its launcher was gone; ended {len(orphans)} processes that were left" if orphans else "had already ended"


def _end_launcher(launcher: ProcessIdentity) -> bool:
    """Whether it was still alive."""
    if not launcher.send(signal.SIGTERM):
        return False
    if not _within(LAUNCHER_GRACE_S, lambda: not launcher.alive):
        launcher.send(signal.SIGKILL)
        _within(LAUNCHER_GRACE_S, lambda: not launcher.alive)
    return True


def _session(server: ProcessIdentity | None) -> int:
    """The server's session, if that id can still belong to it: a session keeps its id while one member is alive."""
    return 0 if server is None or server.replaced else server.pid


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
