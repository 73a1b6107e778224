"""Files near an adapter that look like weights but are not part of it, recognized by their names: none is opened.

A training run's folder collects converted copies and pickles, and these may hold the only copy of what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from kt_model.training import CHECKPOINT

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".gguf", ".h5", ".msgpack"}
)
TRAINERS_OWN = re.compile(
    r"(?:optimizer|scheduler|scaler|sampler|training_args|rng_state(?:_\d+)?|random_states_\d+)(?:_\d+)?\.\w+"
)
"""The training state saved by Hugging Face's Trainer and Accelerate: everything but the weights."""


def left_over(folder: Path, read: Collection[str]) -> list[str]:
    """Names, relative to `folder`, of files that look like weights, in it and beside it if it is a checkpoint of a
    training run. read: names of the files that make up the adapter."""
    inside = [name for name in _weight_files(folder) if name not in read]
    beside = [f"../{name}" for name in _weight_files(folder.parent)] if CHECKPOINT.fullmatch(folder.name) else []
    return [*inside, *beside]


def _weight_files(folder: Path) -> Iterator[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return
    for name in names:
        if Path(name).suffix in WEIGHT_SUFFIXES and not TRAINERS_OWN.fullmatch(name):
            yield name
