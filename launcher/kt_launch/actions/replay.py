"""action=replay: the same command in the same environment, from any folder, as a new run; reports what has changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.diff import plan_differences
from kt_launch.actions.page import LAUNCH_KEYS, RUN_KEYS, Data, Page
from kt_launch.commandline.terminal import print_table
from kt_launch.config.dump import changed, kept_values
from kt_launch.gathering.facts import prepare
from kt_launch.gathering.replan import command_differences, recorded_config, replan
from kt_launch.machine.folders import runs_folder
from kt_launch.machine.host import read_host
from kt_launch.machine.ports import probe_port
from kt_launch.planning.device import check_installed
from kt_launch.running.launch import record, start
from kt_launch.runs.lock import SET, Difference, differences, plan_digest, read_environment, read_lock
from kt_launch.runs.replay_safety import comes_back, require_own, trusted
from kt_launch.runs.runs import Run, find_run, read_plan
from kt_model.errors import EXIT_OK, LaunchError, LaunchErrors, Problems, errors_of
from kt_model.plan import LaunchPlan
from kt_model.printable import say

PAGE = Page(
    (
        "Starts a recorded run again, from any folder, with identical arguments and environment, as a new run. "
        "Differences are reported first: package versions, git state, CPU and GPU, and every file of checkpoint "
        "and adapter whose hash changed.",
        "A run folder is data: arguments and variables are resolved again from its config, and if the plan has "
        "others, they are listed and nothing is started. What serves others without a key or runs a checkpoint's code "
        "(server.open, model.trust_remote_code) has to be typed again.",
        "With overrides it is planned from the run's config with these on top; a table shows how its plan "
        "differs from the run's. A typed preset (kt=int8, lora=none) replaces that whole section.",
    ),
    (
        ("kt-launch replay RUN", ""),
        ("kt-launch replay RUN replay.start=false", "only report what differs"),
        ("kt-launch replay RUN kt.cpuinfer=8", "with another setting"),
    ),
    (*RUN_KEYS, "replay.", *LAUNCH_KEYS, "detach", "format"),
    data=Data(
        "with replay.start=false a list with an object for each difference",
        (("what", "what differs"), ("then", "as the run recorded it"), ("now", "as it is today")),
    ),
)

OWN_KEYS = ("action", "run", "detach", "replay", "paths", "format", "hydra")
ALWAYS_TYPED = ("model.trust_remote_code", "server.open")
"""What a run folder cannot authorize, since anybody may have made it."""


def run(job: Job) -> int:
    changes = [word for word in job.overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in OWN_KEYS]
    if job.wants_json and job.config.replay.start:
        job.problems.add("format", "only a replay that starts nothing prints JSON", "Set replay.start=false.")
    job.problems.raise_if_any()
    runs = runs_folder(job.config.paths.runs)
    earlier = find_run(runs, job.config.run)
    require_own(earlier.folder)
    recorded = trusted(read_plan(earlier))
    _require_typed(recorded, earlier, changes)
    plan = _changed(recorded, earlier, job, changes) if changes else recorded
    if not changes:
        _validate(plan, job.config.replay.start)
    lock = read_lock(plan, read_host(), list(earlier.lock.get("typed", []))) | {"replay of": str(earlier.folder)}
    then = _with_files_of(earlier.lock, lock) if changes else earlier.lock
    now = _with_files_of(lock, earlier.lock) if changes else lock
    found = differences(then, now | plan_digest(earlier.folder), plan.folder_names)
    others = [] if changes else _other_command(plan, earlier)
    found += others
    summary = f"replay of {earlier.name}: {_summary(len(found), earlier.lock)}"
    if job.wants_json:
        rows = [{"what": what, "then": one, "now": other} for what, one, other in plan_differences(recorded, plan)]
        job.print_json([*(asdict(difference) for difference in found), *rows])
    else:
        say("\n".join([summary, *(f"differs: {difference}" for difference in found)]), kept="\n")
        _show_changes(recorded, plan)
    if found and job.config.replay.strict:
        fix = "Restore it, or set replay.strict=false."
        raise LaunchErrors([LaunchError("replay.strict", str(each), fix) for each in found])
    if not job.config.replay.start:
        return EXIT_OK
    _refuse_other_command(others, earlier)
    restore(earlier.lock)
    here = {"folder": str(Path.cwd()), "environment": read_environment(os.environ)}
    placed, folder = record(plan, str(runs), lock["typed"], lock | here)
    job.record["run_folder"] = str(folder)
    code = start(placed, folder, job.config.detach)
    say(f"kt-launch diff {earlier.name} {folder.name} shows what differs between the two", file=sys.stderr)
    return code


def _changed(recorded: LaunchPlan, earlier: Run, job: Job, changes: list[str]) -> LaunchPlan:
    """A new plan from the run's config, with typed overrides on top, in the run's working folder."""
    base = recorded_config(recorded)
    _go_to(earlier.lock)
    typed = [word.lstrip("+~").partition("=")[0] for word in changes]
    file = str(earlier.folder / "plan.json")
    kept = {key: file for key in kept_values(base) if not any(f"{key}.".startswith(f"{one}.") for one in typed)}
    job.sources = replace(job.sources, presets={}, config_file=kept)
    config = changed(base, job.config, changes)
    update = {"action": job.config.action, "replay": job.config.replay}
    return prepare(config.model_copy(update=update), job.sources, job.problems)


def _require_typed(recorded: LaunchPlan, earlier: Run, changes: list[str]) -> None:
    """Raise LaunchError if the run's config serves others without a key, or allows a checkpoint's code, and that is not
    typed again."""
    tree: Any = recorded.config
    typed = {word.lstrip("+~").partition("=")[0] for word in changes}
    for key in ALWAYS_TYPED:
        section, _, name = key.partition(".")
        part = tree.get(section)
        if isinstance(part, dict) and part.get(name) and key not in typed:
            fix = f"Type kt-launch replay run={earlier.name} {key}=true if you want it."
            raise LaunchError("run", f"its config has {key}=true, which a run folder alone does not allow", fix)


def _other_command(plan: LaunchPlan, earlier: Run) -> list[Difference]:
    """Where the plan's command and environment are not those that its config gives today, in the folder and with the
    variables that the run had."""
    restore(earlier.lock)
    try:
        again = replan(plan)
    except (LaunchError, LaunchErrors) as failure:
        return [Difference(f"plan {each.where}", "possible", f"{each.problem}") for each in errors_of(failure)]
    return [Difference(*row) for row in command_differences(plan, again)]


def _refuse_other_command(found: list[Difference], earlier: Run) -> None:
    """A plan's command is only data: nothing is started that its config does not give."""
    fix = f"Look at {earlier.folder / 'plan.json'}; kt-launch replay run={earlier.name} server.port=0 plans it again."
    if found:
        raise LaunchErrors([LaunchError("run", f"{each} by its config", fix) for each in found])


def _with_files_of(lock: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A lock with only the files that the other one has too."""
    files, others = lock.get("files"), other.get("files") or {}
    return {**lock, "files": {path: files[path] for path in files if path in others}} if files else {**lock}


def _show_changes(recorded: LaunchPlan, plan: LaunchPlan) -> None:
    if rows := plan_differences(recorded, plan):
        print_table(("what", "then", "now"), rows)


def restore(lock: dict[str, Any]) -> None:
    """Restore the run's working folder, and the variables of its environment that tune a computation; secrets are
    today's."""
    then = lock.get("environment")
    if then is not None:
        for name in [name for name in os.environ if comes_back(name) and name not in then]:
            del os.environ[name]
        os.environ.update({name: value for name, value in then.items() if value != SET and comes_back(name)})
    _go_to(lock)


def _go_to(lock: Mapping[str, Any]) -> None:
    """Change to the folder that the run was started in, if it still exists."""
    folder = Path(lock.get("folder", ""))
    if folder.is_dir():
        os.chdir(folder)


def _validate(plan: LaunchPlan, starts: bool) -> None:
    """Check that it can be compared here: its folders exist. To be started, it also needs its port."""
    missing = [path for path in plan.folder_names if not Path(path).exists()]
    problems = Problems()
    for path in missing:
        problems.add("replay", f"{path} no longer exists", "Restore it, or start a new run.")
    if starts:
        check_installed(read_host(), problems)
        port = probe_port(plan.value("server.host"), plan.value("server.port"))
        if not port.free:
            problem = f"{port.number}, which the run used, cannot be used: {port.owner}"
            problems.add("server.port", problem, "Stop it first: the same command needs the same port.")
    problems.raise_if_any()


def _summary(count: int, lock: dict[str, Any]) -> str:
    """The comparison's result; a run without a lock, or one that ended before its files were hashed, cannot be
    compared."""
    found = {0: "nothing differs today", 1: "one thing differs today"}.get(count, f"{count} things differ today")
    if lock.get("files"):
        return found
    print("warning: that run has no hashes of its files, so they cannot be compared", file=sys.stderr)
    return found if count else "what differs today is unknown"
