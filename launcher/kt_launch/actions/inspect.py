"""action=inspect: describes the chosen adapters, and checks them against their base if one is named. Starts nothing."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import ADAPTER_KEYS, Data, Page
from kt_launch.commandline.adapter_tables import print_report, report
from kt_launch.gathering.hub import fetch
from kt_launch.machine.host import read_host
from kt_launch.planning.locate import LocatedFolder, locate_adapters, locate_allowed, locate_model
from kt_model.adapter_capacity import whole_groups
from kt_model.adapter_siblings import siblings_folder
from kt_model.checkpoint import Checkpoint, read_checkpoint, require_config
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.importer import Imported, import_adapter
from kt_model.importer.admission import (
    WHERE,
    message_of,
    require_allowed,
    require_loadable,
    require_modules,
    require_rank,
)
from kt_model.importer.serving import target_modules
from kt_model.jsonfile import read_json_or_empty
from kt_model.training import ADAPTER_CONFIG

Loading = dict[str, Any]
ADAPTER = re.compile(r"lora(?:\.(?:path|adapters)\b|$)")
"""Keys that choose an adapter."""
LOADING_KEYS = ("lora.ignore", "lora.allow_missing", "lora.allow", "lora.max_rank", "lora.target_modules")
"""Keys that a running server's answer depends on."""
PAGE = Page(
    (
        "Reads the chosen adapters as serving would and reports them: format, ranks, effective scale, layers and "
        "experts covered, what is served as zero, norms of the weight changes, bytes. Every key of the files is "
        "counted once, by where it goes: routed experts (ours), attention, shared experts and dense MLP (SGLang's "
        "own LoRA), or refused, with the reason.",
        "For fused experts it says in which order the columns of B are read, and why: rank_major is PEFT's, "
        "grouped_by_expert that of Unsloth before 17 September 2026, whose files look the same. lora.layout, or "
        "lora.adapters.<name>.layout for one of several, sets it where neither files nor values show it.",
        "With a base it also says how a running server would answer a request to load the adapter: the reason for "
        "refusing it, or what the server must be started with (lora.max_rank, lora.target_modules, lora.allow, unless "
        "they are typed). Whether the adapter has an effect is only tested there.",
    ),
    (
        ("kt-launch inspect", "the demo's adapter"),
        ("kt-launch inspect model=deepseek_v2_lite lora=west_all --json", "for programs"),
    ),
    (*ADAPTER_KEYS, *LOADING_KEYS, "format"),
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
            ("base", "folder of the model that it is compared with, or null"),
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
            (
                "loading",
                "success and error_message as /load_lora_adapter would have them, and what the server needs to "
                "be started with; null without a base",
            ),
        ),
    ),
)


def run(job: Job) -> None:
    job.problems.raise_if_any()
    fetch(job.config, read_host, job.problems)
    folders = locate_adapters(job.config, job.sources, os.environ, job.problems)
    if not folders and not job.config.lora.adapters:
        job.problems.add("lora", "no adapter is chosen", "Set lora=/path/to/folder, or lora=<preset>.")
    readable = _has_model(job)
    reports = {}
    for folder in folders:
        with job.problems.collect():
            base = _base(job, folder) if readable else None
            imported = import_adapter(folder.path, base, where=folder.key, layout=folder.layout)
            run = folder.training
            told = {"name": folder.name} | report(imported, base)
            told |= {"checkpoint": run and run.chosen, "checkpoint_source": run and run.why}
            if readable:
                reports[folder.name] = told | {"loading": _loading(job, folder, imported, base)}
            for problem in imported.problems:
                job.problems.add_error(problem)
    if reports and job.wants_json:
        job.print_json(list(reports.values()))
    elif reports:
        for name, facts in reports.items():
            if facts["keys"]["total"]:
                print_report(name, facts)
    job.problems.raise_if_any()


def _loading(job: Job, folder: LocatedFolder, imported: Imported, base: Checkpoint | None) -> Loading | None:
    """What a running server would answer if it were to load the adapter, as far as files and keys tell: `error_message`
    is the one of its refusal, and needs names what it has to be started with. Nothing without a base."""
    if base is None:
        return None
    lora, path = job.config.lora, folder.training.folder if folder.training else folder.path
    allowed = locate_allowed(job.config, job.sources, os.environ, job.problems)
    homes = allowed.paths if lora.allow is not None or allowed.paths else (siblings_folder(path),)
    try:
        real = str(require_allowed(path, homes))
        served = require_loadable(_as_loaded(imported, folder.key), base, lora.ignore, lora.allow_missing)
        rank, modules = served.largest_rank, target_modules(served)
        require_rank(rank, lora.max_rank, real)
        require_modules(modules, whole_groups(lora.target_modules or modules), real)
    except (LaunchError, LaunchErrors) as failure:
        return {"success": False, "error_message": message_of(failure), "needs": []}
    needs = [] if lora.max_rank else [f"lora.max_rank={rank}"]
    needs += [] if lora.target_modules else [f"lora.target_modules=[{','.join(sorted(modules))}]"]
    needs += [] if lora.allow is not None else [f"lora.allow=[{','.join(map(str, homes))}]"]
    return {"success": True, "error_message": "", "needs": needs}


def _as_loaded(imported: Imported, key: str) -> Imported:
    """Its mistakes, worded for the request's field instead of our key."""
    told = [LaunchError(WHERE, each.problem, each.fix) if each.where == key else each for each in imported.problems]
    return replace(imported, problems=tuple(told))


def _has_model(job: Job) -> bool:
    """Whether the typed model, if there is one, is a checkpoint's folder."""
    told = len(job.problems.errors)
    with job.problems.collect():
        if any(re.match(r"model\b", text) for text in job.sources.typed):
            require_config(locate_model(job.config, job.sources, os.environ).path, "model.path")
    return len(job.problems.errors) == told


def _base(job: Job, folder: LocatedFolder) -> Checkpoint | None:
    """The typed model, or the preset's; else the one that the adapter names, if it is on this machine."""
    typed = {text.partition("=")[0] for text in job.sources.typed}
    if any(re.match(r"model\b", key) for key in typed) or not any(ADAPTER.match(key) for key in typed):
        return read_checkpoint(locate_model(job.config, job.sources, os.environ).path)
    try:
        named = read_json_or_empty(folder.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        return read_checkpoint(Path(named)) if isinstance(named, str) and Path(named).is_absolute() else None
    except (OSError, ValueError, LaunchError):
        return None
