"""kt-launch diff runs=[a,b]: what differs between two recorded runs: values, command, environment, machine, files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.commandline.terminal import print_table, show_value
from kt_launch.machine.folders import runs_folder
from kt_launch.runs.runs import Run, find_run, read_plan
from kt_model.errors import LaunchError
from kt_model.plan import LaunchPlan
from kt_model.units import GIB

PAGE = Page(
    ("Shows what differs between two recorded runs: values, command, environment, machine, packages, files.",),
    (("kt-launch diff RUN OTHER", ""),),
    ("runs", "paths.runs", "format"),
    data=Data(
        "a list with an object for each difference",
        (("what", "what differs"), ("one", "in the first of the two runs"), ("other", "in the second")),
    ),
)

ABSENT = "-"
EXPECTED_TO_DIFFER = ("server.port", "run.folder", "fit.free")


def run(job: Job) -> None:
    job.problems.raise_if_any()
    if len(job.config.runs) != 2:
        fix = "Type kt-launch diff ONE OTHER; kt-launch runs lists them."
        raise LaunchError("runs", f"{len(job.config.runs)} given, 2 are expected", fix)
    folder = runs_folder(job.config.paths.runs)
    one, other = (find_run(folder, name) for name in job.config.runs)
    rows = _rows(_flat(one), _flat(other))
    if job.wants_json:
        job.print_json([{"what": what, "one": left, "other": right} for what, left, right in rows])
    elif rows:
        print_table(("what", one.name, other.name), [tuple(_shortened(cell) for cell in row) for row in rows])
    else:
        print(f"{one.name} and {other.name} are the same except for {', '.join(EXPECTED_TO_DIFFER)}")


def _rows(left: Mapping[str, str], right: Mapping[str, str]) -> list[tuple[str, str, str]]:
    keys = [*left, *(key for key in right if key not in left)]
    rows = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def plan_differences(one: LaunchPlan, other: LaunchPlan) -> list[tuple[str, str, str]]:
    """What differs between two plans, one row each."""
    return _rows(_flat_plan(one), _flat_plan(other))


def _flat(run: Run) -> dict[str, str]:
    """Everything of a run that can be compared, by name; the typed command shows in the values."""
    sections = {section: rows for section, rows in run.lock.items() if isinstance(rows, dict)}
    lock = {
        f"{section} {name}": show_value(value) for section, rows in sections.items() for name, value in rows.items()
    }
    return _flat_plan(read_plan(run)) | lock


def _flat_plan(plan: LaunchPlan) -> dict[str, str]:
    resolved = {key: item.value for key, item in plan.resolved.items() if key not in EXPECTED_TO_DIFFER}
    fit = resolved.pop("fit", None) or {}
    values = {key: show_value(value) for key, value in resolved.items()}
    sizes = ((f"fit {place}: {part}", size) for place, parts in fit.items() for part, size in parts.items())
    values |= {what: f"{size / GIB:.2f} GiB" for what, size in sizes}
    values |= {f"env {name}": value for name, value in plan.env.items()}
    server = plan.config.get("server")
    extra = server.get("extra_args") if isinstance(server, dict) else None
    values["extra arguments"] = " ".join(map(str, extra)) if isinstance(extra, list) else show_value(extra)
    return values


def _shortened(cell: str) -> str:
    """Hashes and file folders shortened to what distinguishes them; JSON has them in full."""
    if file := re.fullmatch(r"(files) (/.*)", cell):
        return f"{file[1]} {'/'.join(Path(file[2]).parts[-2:])}"
    return re.sub(r"sha256:([0-9a-f]{12})[0-9a-f]{52}", r"sha256:\1…", cell)
