"""action=merge: bakes the chosen adapter into a checkpoint of its own."""

from __future__ import annotations

import os
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.checkpoint import read_checkpoint
from kt_launch.errors import EXIT_OK, LaunchError
from kt_launch.importer import import_adapter
from kt_launch.locate import Place, absolute, locate_adapters, locate_model
from kt_launch.weights.experts import ExpertSource
from kt_launch.weights.merging import merge


def run(job: Job) -> int:
    places = locate_adapters(job.config, job.sources, os.environ, job.problems)
    with job.problems.collect():
        _check_choice(job, places)
    job.problems.raise_if_any()
    base = read_checkpoint(locate_model(job.config, job.sources, os.environ).path, float8=True)
    imported = import_adapter(places[0].path, base, where=places[0].key).demand_sound()
    target = absolute(str(job.config.merge.path))
    for folder in (base.path, places[0].path):
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
            raise LaunchError("merge.path", f"{target} is inside of {folder}, which is read", "Name another folder.")
    made = merge(ExpertSource(base), imported, target)
    print(f"{'made' if made else 'there already'}: {target}")
    return EXIT_OK


def _check_choice(job: Job, places: list[Place]) -> None:
    if job.config.merge.path is None:
        raise LaunchError("merge.path", "no folder given for the merged checkpoint", "Type merge.path=/its/folder.")
    if len(places) != 1:
        names = ", ".join(place.name for place in places) or "none"
        raise LaunchError("lora", f"one adapter can be merged, chosen are {names}", "Type lora.path=/its/folder.")
