"""action=inspect: what the chosen adapters are, held against their base when one is named; starts nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import ADAPTER_KEYS, Data, Page
from kt_launch.commandline.adapter_tables import print_report, report
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
        ("kt-launch inspect model=deepseek_v2_lite lora=west_all --json", "for programs"),
    ),
    (*ADAPTER_KEYS, "format"),
    picture=True,
    data=Data(
        "a list with an object for each adapter",
        (
            ("name", "what requests call it"),
            ("path", "folder that is read"),
            ("checkpoint", "of a training run, the folder of it that was chosen; null if there is no run"),
            ("checkpoint_source", "why that one; null if there is no run"),
            ("format", "letter of the file format"),
            ("format_name", "what that letter means"),
            ("base", "folder of the model that it is held against, or null"),
            ("layout", "order of B's columns in fused experts, or null"),
            ("layout_source", "where that was read or measured, or null"),
            ("keys", "number of tensors: total, and by where they go"),
            ("ranks", "part to its ranks"),
            ("scale", "effective scale (alpha/rank) of most pairs"),
            ("scales", "part to its scales"),
            ("layers", "layers with any weights"),
            ("expert_layers", "layers with weights for routed experts"),
            ("experts", "routed experts of a layer"),
            ("experts_covered", "layer to the number of experts with weights"),
            ("zero_filled", "expert projections without weights"),
            ("delta_norms", "part to the smallest, mean and largest norm of its weight changes"),
            ("bytes", "of the weights"),
            ("not_served", "part to the reason"),
            ("refused", "tensor to the reason"),
            ("warnings", "sentences"),
            ("errors", "sentences; then the exit code is 2"),
        ),
    ),
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
            reports[folder.name] = {"name": folder.name} | report(imported, base) | _checkpoint(folder)
            for problem in imported.problems:
                job.problems.add_error(problem)
    if reports and job.wants_json:
        job.print_json(list(reports.values()))
    elif reports:
        for name, facts in reports.items():
            if facts["keys"]["total"]:
                print_report(name, facts)
    job.problems.raise_if_any()
    return EXIT_OK


def _checkpoint(folder: LocatedFolder) -> dict[str, str | None]:
    """Which checkpoint of a training run is told of, and why."""
    training = folder.training
    return {
        "checkpoint": training.chosen if training else None,
        "checkpoint_source": training.why if training else None,
    }


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
