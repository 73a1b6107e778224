"""Which of the checkpoint's tensors reach SGLang, and under which names: the names that its loaders know, whatever they
are called on disk, and without experts that come from elsewhere (the packed cache, or a folder of quantized experts).
SGLang's own iterators touch every tensor of every file, which reads the whole checkpoint only to skip most of it; and
they pass on fused experts unchanged, which most of its loaders drop silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kt_model.checkpoint import Checkpoint
from kt_model.families import expert_weights
from kt_model.float8 import WEIGHT_SCALES
from kt_sglang.moe.layers import LAYERS
from kt_sglang.moe.served_checkpoint import served_checkpoint

_counts = {"unread": 0}


def unread_names(base: Checkpoint) -> frozenset[str]:
    """Tensors that are not needed."""
    names = [
        name
        for layer, weights in LAYERS.weights.items()
        if weights.from_elsewhere
        for expert in weights.placement.on_cpu
        for name in expert_weights(base.family, layer, expert)
    ]
    scales = (name.removesuffix("weight") + scale for name in names for scale in WEIGHT_SCALES)
    return frozenset(names).union(scales)


def around_prepare_weights(original: Callable[..., Any], loader: Any, model_path: str, *more: Any, **named: Any) -> Any:
    """AROUND hook of `DefaultModelLoader._prepare_weights`: folder, files, and whether they are safetensors. For the
    served checkpoint, returns the files that the plan counted. SGLang finds none in a folder whose own name contains
    * ? or [, since it treats these as a pattern; otherwise it finds the same, and the hook can go when it escapes
    names."""
    base = served_checkpoint()
    if Path(model_path) != base.path or named.get("allow_patterns_overrides") or any(more[2:]):
        return original(loader, model_path, *more, **named)
    return model_path, [str(file) for file in base.files], True


def around_weights_iterator(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], files: list[str], *arguments: Any, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """AROUND hook of SGLang's safetensors iterators: SGLang's own if everything is needed as stored, else ours."""
    base = served_checkpoint()
    elsewhere = any(weights.from_elsewhere for weights in LAYERS.weights.values())
    if not (elsewhere or base.stored_otherwise) or not _all_within(files, base.path):
        return original(files, *arguments, **options)
    return iterate_needed(files, unread_names(base), base)


def _all_within(files: list[str], folder: Path) -> bool:
    """False for a draft model's files, which are not handled here."""
    return all(Path(file).parent.resolve() == folder.resolve() for file in files)


def iterate_needed(
    files: list[str], unread: frozenset[str], base: Checkpoint | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all needed tensors; one that `base` has under other names is split into views under those."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  # not a dictionary
                names = base.stored_otherwise.get(stored, [stored]) if base else [stored]
                needed = [name for name in names if name not in unread]
                _counts["unread"] += len(names) - len(needed)
                whole = tensors.get_tensor(stored) if needed else None
                for name in needed:
                    yield name, base.located[name].cut(whole) if base and name != stored else whole


def unread_tensors() -> int:
    """How many tensors of the checkpoint were skipped unread."""
    return _counts["unread"]
