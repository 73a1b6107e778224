"""action=config: the validated config as a file to keep, for `kt-launch --config FILE`. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.config.dump import MADE_WITH, anchored, kept_values, nested, write_made_with, write_yaml
from kt_launch.config.schema import read_fields
from kt_launch.gathering.facts import prepare
from kt_model.installed import product, versions
from kt_model.plan import LaunchPlan

PAGE = Page(
    (
        "Prints the validated config as YAML: what differs from the defaults, each value with its source. "
        "`kt-launch --config FILE` starts from such a file, with further overrides on top, and `-m` for sweeps; what "
        "it does is always typed, never read from a file.",
        "It works from every folder: paths are printed in full, but for what begins with ~. A relative path that you "
        "write into such a file starts at the file's own folder, so that it can be committed beside what it names.",
        "config.resolved=true freezes what was left open at this machine's values, and adds made_with: versions and "
        "the SHA-256 of every file of checkpoint and adapters. A launch from it warns of each that is another one "
        "today; large files are compared once they were read here.",
    ),
    (
        ("kt-launch config model=deepseek_v2_lite lora=west_all kt.cpuinfer=48 > run.yaml", ""),
        ("kt-launch --config run.yaml kt.method=int8", "start from it"),
    ),
    ("config.", "format"),
    data=Data("one object with the keys of the schema (kt-launch schema)"),
)


def run(job: Job) -> None:
    asked = job.config.config
    plan = prepare(job.config, job.sources, job.problems) if asked.resolved else None
    job.problems.raise_if_any()
    values = _frozen(job, plan, asked.full) if plan else kept_values(job.config, asked.full)
    values = {key: anchored(key, value, Path.cwd()) for key, value in values.items()}
    stood_on = _stood_on(plan) if plan else None
    if job.wants_json:
        job.print_json(nested(values) | ({MADE_WITH: stood_on} if stood_on else {}))
    else:
        print(write_yaml(values, _sources(job, plan), [f"{product()}: kt-launch --config <this file>"]), end="")
        print(write_made_with(stood_on) if stood_on else "", end="")


def _frozen(job: Job, plan: LaunchPlan, full: bool) -> dict[str, Any]:
    """The saved values, with what the plan resolved for values left open."""
    known = {key for key, _ in read_fields()}
    found = {key: item.value for key, item in plan.resolved.items() if key in known and item.value is not None}
    for key in _elsewhere(job, plan):
        found.pop(key, None)
    for name, adapter in job.config.lora.adapters.items():
        if adapter.hub and f"lora.{name}.revision" in plan.resolved:
            found[f"lora.adapters.{name}.revision"] = plan.value(f"lora.{name}.revision")
    values, order = {**kept_values(job.config, full), **found}, kept_values(job.config, full=True)
    beside = [key for each in order for key in (each, f"{each.removesuffix('.hub')}.revision")]
    return {key: values[key] for key in dict.fromkeys(beside) if key in values}


def _elsewhere(job: Job, plan: LaunchPlan) -> list[str]:
    """Keys whose value is only this machine's root for folders that other keys name."""
    on_hub = job.config.model.hub and not job.config.model.path
    same = plan.value("kt.weight_path") == plan.value("model.path")
    follows = job.config.lora.allow is None
    places = {"model.path": on_hub, "kt.weight_path": same, "lora.allow": follows}
    return [key for key, is_place in places.items() if is_place]


def _sources(job: Job, plan: LaunchPlan | None) -> Callable[[str], str]:
    resolved = plan.resolved if plan else {}
    return lambda key: resolved[key].source if key in resolved else job.sources.of(key)


def _stood_on(plan: LaunchPlan) -> dict[str, dict[str, str]]:
    """Versions, and digests of the files in the plan's folders."""
    from kt_launch.runs.lock import hash_files

    folders = plan.folder_names
    digests = {Path(path): digest for path, digest in hash_files(plan).items()}
    named = {file: folders.get(str(file.parent)) for file in digests}
    files = {f"{named[file]}/{file.name}": digest for file, digest in digests.items() if named[file]}
    return {"versions": versions(), "files": files}
