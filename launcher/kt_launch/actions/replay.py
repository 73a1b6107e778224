"""action=replay: the same command in the same environment, from any folder, as a new run; says what differs today."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import RUN_KEYS, Data, Page
from kt_launch.machine.folders import runs_folder
from kt_launch.machine.host import probe_port, read_host
from kt_launch.running.launch import record, start
from kt_launch.running.lock import SET, differences, folder_names, plan_digest, read_lock
from kt_launch.running.runs import find_run, read_plan
from kt_launch.running.trust import comes_back, require_own, trusted
from kt_model.errors import EXIT_OK, LaunchError, LaunchErrors
from kt_model.plan import LaunchPlan
from kt_model.printable import say

PAGE = Page(
    (
        "Starts a recorded run again, from any folder, with identical arguments and environment, as a new run. "
        "Differences are reported first: package versions, git state, CPU and GPU, and every file of checkpoint "
        "and adapter whose hash changed.",
    ),
    (
        ("kt-launch action=replay run=RUN", ""),
        ("kt-launch action=replay run=RUN replay.start=false", "only report what differs"),
    ),
    (*RUN_KEYS, "replay.", "detach", "format"),
    data=Data(
        "with replay.start=false a list with an object for each difference",
        (("what", "what differs"), ("then", "as the run recorded it"), ("now", "as it is today")),
    ),
)

OWN_KEYS = ("action", "run", "detach", "replay", "paths", "format", "hydra")


def run(job: Job) -> int:
    _refuse_changes(job)
    if job.wants_json and job.config.replay.start:
        job.problems.add("format", "only a replay that starts nothing prints JSON", "Set replay.start=false.")
    job.problems.raise_if_any()
    earlier = find_run(runs_folder(job.config.paths.runs), job.config.run)
    require_own(earlier.folder)
    plan = trusted(read_plan(earlier))
    _validate(plan, job.config.replay.start)
    lock = read_lock(plan, read_host(), list(earlier.lock.get("typed", []))) | {"replay of": str(earlier.folder)}
    found = differences(earlier.lock, lock | plan_digest(earlier.folder), folder_names(plan))
    summary = f"replay of {earlier.name}: {_summary(len(found), earlier.lock)}"
    if job.wants_json:
        job.print_json([asdict(difference) for difference in found])
    else:
        say("\n".join([summary, *(f"differs: {difference}" for difference in found)]), kept="\n")
    if found and job.config.replay.strict:
        fix = "Restore it, or set replay.strict=false."
        raise LaunchErrors([LaunchError("replay.strict", str(each), fix) for each in found])
    if not job.config.replay.start:
        return EXIT_OK
    restore(earlier.lock)
    placed, folder = record(plan, job.config.paths.runs, lock["typed"], lock)
    job.record["run_folder"] = str(folder)
    return start(placed, folder, job.config.detach)


def restore(lock: dict[str, Any]) -> None:
    """The folder that the run had, and of its environment what tunes a computation; secrets are those of today."""
    then = lock.get("environment")
    if then is not None:
        for name in [name for name in os.environ if comes_back(name) and name not in then]:
            del os.environ[name]
        os.environ.update({name: value for name, value in then.items() if value != SET and comes_back(name)})
    folder = Path(lock.get("folder", ""))
    if folder.is_dir():
        os.chdir(folder)


def _refuse_changes(job: Job) -> None:
    for override in job.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] not in OWN_KEYS:
            job.problems.add(key, "a replay takes no other settings", "Leave it out, or start a new run with it.")


def _validate(plan: LaunchPlan, starts: bool) -> None:
    """That it can be compared here: its folders are there. To be started it also needs its port."""
    missing = [path for path in folder_names(plan) if not Path(path).exists()]
    mistakes = [
        LaunchError("replay", f"{path} no longer exists", "Restore it, or start a new run.") for path in missing
    ]
    port = probe_port(plan.value("server.host"), plan.value("server.port"))
    if starts and not port.free:
        problem = f"{port.number}, which the run used, cannot be used: {port.owner}"
        mistakes.append(LaunchError("server.port", problem, "Stop it first: the same command needs the same port."))
    if mistakes:
        raise LaunchErrors(mistakes)


def _summary(count: int, lock: dict[str, Any]) -> str:
    """What can be said: a run without a lock, or one that ended before its files were hashed, cannot be compared."""
    found = {0: "nothing differs today", 1: "one thing differs today"}.get(count, f"{count} things differ today")
    if lock.get("files"):
        return found
    print("warning: that run has no hashes of its files, so they cannot be compared", file=sys.stderr)
    return found if count else "what differs today cannot be told"
