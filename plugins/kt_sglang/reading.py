"""How the checkpoint's tensors reach SGLang: under the names that its loaders know, whatever they are called on disk,
and without the experts that come from elsewhere, be it the packed cache or a folder of quantized experts. SGLang's own
iterators touch every tensor of every file before they hand it on, which reads the whole checkpoint from the disk only
to pass most of it over; and fused experts they hand on as they are, which most of its loaders drop without a word.
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
from kt_sglang.layers import LAYERS
from kt_sglang.served_checkpoint import served_checkpoint

_counts = {"unread": 0}


def unread_names(base: Checkpoint) -> frozenset[str]:
    """The tensors that nobody needs."""
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
    """AROUND hook of `DefaultModelLoader._prepare_weights`: folder, files, and that they are safetensors. Those of the
    served checkpoint are the files that the plan counted. SGLang finds none in a folder whose own name has a * ? or [,
    since it takes these for a pattern; elsewhere it finds the same, and the hook can go when it escapes names.
    """
    base = served_checkpoint()
    if Path(model_path) != base.path or named.get("allow_patterns_overrides") or any(more[2:]):
        return original(loader, model_path, *more, **named)
    return model_path, [str(file) for file in base.files], True


def around_weights_iterator(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], files: list[str], *arguments: Any, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """AROUND hook of SGLang's safetensors iterators: theirs where all is needed as it is stored, else our own."""
    base = served_checkpoint()
    elsewhere = any(weights.from_elsewhere for weights in LAYERS.weights.values())
    if not (elsewhere or base.stored_otherwise) or not _all_within(files, base.path):
        return original(files, *arguments, **options)
    return iterate_needed(files, unread_names(base), base)


def _all_within(files: list[str], folder: Path) -> bool:
    """A draft model's files are not ours to judge."""
    return all(Path(file).parent.resolve() == folder.resolve() for file in files)


def iterate_needed(
    files: list[str], unread: frozenset[str], base: Checkpoint | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all the others; a tensor that `base` has under other names comes as these, in views of it."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for stored in tensors.keys():  # noqa: SIM118  # it is no dictionary
                names = base.stored_otherwise.get(stored, [stored]) if base else [stored]
                needed = [name for name in names if name not in unread]
                _counts["unread"] += len(names) - len(needed)
                whole = tensors.get_tensor(stored) if needed else None
                for name in needed:
                    yield name, base.located[name].cut(whole) if base and name != stored else whole


def unread_tensors() -> int:
    """How many tensors of the checkpoint were passed over unread."""
    return _counts["unread"]
