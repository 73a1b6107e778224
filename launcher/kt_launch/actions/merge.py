"""action=merge: merges the chosen adapter into a new checkpoint, or copies a float8 checkpoint as bfloat16."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import ADAPTER_KEYS, Data, Page
from kt_launch.gathering.hub import fetch
from kt_launch.machine.host import read_host
from kt_launch.planning.locate import LocatedFolder, locate_adapters, locate_model
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource
from kt_model.float8 import FLOAT8
from kt_model.importer import Imported, import_adapter
from kt_model.printable import say
from kt_model.user_paths import absolute
from kt_model.weights.merging import merge

PAGE = Page(
    (
        "Writes the checkpoint with one adapter merged into every matrix that it changes, streaming and atomic like "
        "quantize. For engines without adapter support, and as a reference for served adapters.",
        "A checkpoint in FP8, with a scale for each tensor, row or block, becomes BF16 in the process, also with "
        "lora=none; serve the copy. Fused experts are written one by one, which every engine reads.",
    ),
    (
        ("kt-launch merge model=deepseek_v2_lite lora=west_all merge.path=/models/merged", ""),
        ("kt-launch merge model=/models/V3 merge.path=/models/V3-BF16", "FP8 to BF16, no adapter"),
    ),
    (*ADAPTER_KEYS, "merge.", "format"),
    data=Data("one object", (("path", "the merged checkpoint"), ("made", "false where it was there already"))),
)


def run(job: Job) -> None:
    fetch(job.config, read_host, job.problems)
    folders = locate_adapters(job.config, job.sources, os.environ, job.problems)
    with job.problems.collect():
        _check_choice(job, folders)
    job.problems.raise_if_any()
    base = read_checkpoint(locate_model(job.config, job.sources, os.environ).path, float8=True)
    if not folders and base.expert_dtype != FLOAT8:
        problem = f"nothing to merge: no adapter is chosen, and {base.path} is not in float8"
        raise LaunchError("lora", problem, "Set lora.path=/path/to/folder.")
    imported = [
        import_adapter(folder.path, base, where=folder.key, layout=folder.layout).require_sound() for folder in folders
    ]
    _tell(folders, imported)
    target = absolute(str(job.config.merge.path))
    for folder in (base.path, *(folder.path for folder in folders)):
        if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
            raise LaunchError("merge.path", f"{target} is inside {folder}, which is read", "Choose another folder.")
    made = merge(ExpertSource(base), imported[0] if imported else None, target)
    if job.wants_json:
        job.print_json({"path": str(target), "made": made})
    else:
        say(f"{'made' if made else 'there already'}: {target}")


def _tell(folders: list[LocatedFolder], imported: list[Imported]) -> None:
    """Print which checkpoint of a training run is merged, and the adapter's warnings."""
    for folder in folders:
        if folder.training:
            say(f"{folder.name}: {folder.training.chosen} ({folder.training.why})", file=sys.stderr)
    for warning in (warning for one in imported for warning in one.warnings):
        say(f"warning: {warning}", file=sys.stderr)


def _check_choice(job: Job, folders: list[LocatedFolder]) -> None:
    if job.config.merge.path is None:
        raise LaunchError("merge.path", "no folder given for the merged checkpoint", "Set merge.path=/path/to/folder.")
    if len(folders) > 1:
        problem = f"only one adapter can be merged, but several are chosen: {', '.join(one.name for one in folders)}"
        raise LaunchError("lora", problem, "Set lora.path=/path/to/folder.")
