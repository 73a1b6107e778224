"""action=inspect: what the chosen adapters are, held against their base when one is named; starts nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import ADAPTER_KEYS, Page
from kt_launch.commandline.adapter_tables import print_json, print_report, report
from kt_launch.planning.locate import LocatedFolder, locate_adapters, locate_model
from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.errors import EXIT_OK, LaunchError
from kt_model.importer import import_adapter
from kt_model.jsonfile import read_json_or_empty
from kt_model.training import ADAPTER_CONFIG

PAGE = Page(
    (
        "Reads the chosen adapters as serving would and reports them: format, ranks, effective scale, layers and "
        "experts covered, what is served as zero, norms of the weight changes, bytes. Every key of the files is "
        "counted once, by where it goes: routed experts (ours), attention, shared experts and dense MLP (SGLang's "
        "own LoRA), or refused, with the reason.",
        "For fused experts it says in which order the columns of B are read, and why: rank_major is PEFT's, "
        "grouped_by_expert that of Unsloth before 17 September 2026, whose files look the same. lora.layout, or "
        "lora.adapters.<name>.layout for one of several, sets it where neither files nor values show it.",
    ),
    (
        ("kt-launch action=inspect", "the demo's adapter"),
        ("kt-launch action=inspect model=deepseek_v2_lite lora=west_all inspect.format=json", "for programs"),
    ),
    (*ADAPTER_KEYS, "inspect."),
    picture=True,
)


def run(job: Job) -> int:
    folders = locate_adapters(job.config, job.sources, os.environ, job.problems)
    if not folders:
        job.problems.add("lora", "no adapter is chosen", "Set lora.path=/path/to/folder, or lora=<preset>.")
    reports = {}
    for folder in folders:
        with job.problems.collect():
            base = _base(job, folder)
            imported = import_adapter(folder.path, base, where=folder.key, layout=folder.layout)
            reports[folder.name] = report(imported, base) | _checkpoint(folder)
            for problem in imported.problems:
                job.problems.add_error(problem)
    if reports and job.config.inspect.format == "json":
        print_json(reports)
    elif reports:
        for name, facts in reports.items():
            if facts["keys"]["total"]:
                print_report(name, facts)
    job.problems.raise_if_any()
    return EXIT_OK


def _checkpoint(folder: LocatedFolder) -> dict[str, str]:
    """Which checkpoint of a training run is told of, and why."""
    training = folder.training
    return {"checkpoint": training.chosen, "checkpoint_source": training.why} if training else {}


def _base(job: Job, folder: LocatedFolder) -> Checkpoint | None:
    """The model that was typed, or that belongs to the preset; else the one that the adapter names, if it is here."""
    typed = {re.split("[.=]", text, maxsplit=1)[0] for text in job.sources.typed}
    if "model" in typed or "lora" not in typed:
        return read_checkpoint(locate_model(job.config, job.sources, os.environ).path)
    try:
        named = read_json_or_empty(folder.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        return read_checkpoint(Path(named)) if isinstance(named, str) and Path(named).is_absolute() else None
    except (OSError, ValueError, LaunchError):
        return None
