"""Which tensors of the checkpoint SGLang leaves unread: experts that come from elsewhere, be it the packed cache or a
folder of quantized experts. SGLang's own iterators touch every tensor of every file before they hand it on, which reads
the whole checkpoint from the disk only to pass most of it over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from kt_launch.checkpoint import Checkpoint
from kt_launch.families import expert_weights
from kt_launch.float8 import WEIGHT_SCALES

if TYPE_CHECKING:
    from kt_sglang.weights import ExpertWeights

_elsewhere: dict[int, ExpertWeights] = {}
_counts = {"unread": 0}


def leave_unread(weights: ExpertWeights) -> None:
    """This layer's CPU experts do not come from the checkpoint."""
    _elsewhere[weights.layer_id] = weights


def unread_names(base: Checkpoint) -> frozenset[str]:
    """The tensors that nobody needs."""
    names = [
        name
        for layer, weights in _elsewhere.items()
        for expert in range(weights.first_expert, weights.num_experts)
        for name in expert_weights(base.family, layer, expert)
    ]
    scales = (name.removesuffix("weight") + scale for name in names for scale in WEIGHT_SCALES)
    return frozenset(names).union(scales)


def around_weights_iterator(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], files: list[str], *arguments: Any, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """AROUND hook of SGLang's safetensors iterators: theirs where everything is needed, else one that skips."""
    from kt_sglang.adapters import served_checkpoint

    if not _elsewhere or not _all_within(files, served_checkpoint().path):
        return original(files, *arguments, **options)
    return iterate_needed(files, unread_names(served_checkpoint()))


def _all_within(files: list[str], folder: Path) -> bool:
    """A draft model's files are not ours to judge."""
    return all(Path(file).parent.resolve() == folder.resolve() for file in files)


def iterate_needed(files: list[str], unread: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all the others."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                if name in unread:
                    _counts["unread"] += 1
                else:
                    yield name, tensors.get_tensor(name)


def unread_tensors() -> int:
    """How many tensors of the checkpoint were passed over unread."""
    return _counts["unread"]
