"""Which files of an adapter's folder are read: one file, or the shards that an index names, plus KT's own file.

An index names each tensor's shard, and the shards must hold exactly those tensors. Pickles are named, never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from kt_model.errors import LaunchError, shown
from kt_model.importer import kt_training
from kt_model.tensors.folder import read_index
from kt_model.tensors.header import read_header
from kt_model.training import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
AGAIN = "Copy the whole folder again."


def weight_files(folder: Path, where: str) -> list[Path]:
    """The files that hold its tensors. Raises LaunchError if there are none, or if it is ambiguous which ones count."""
    for file in (folder / WEIGHTS, folder / INDEX, folder / kt_training.FILE):
        if file.is_symlink() and not file.is_file():
            raise LaunchError(str(file), "is a broken link", AGAIN)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    if (folder / INDEX).is_file():
        if files:
            problem = f"{folder} has {WEIGHTS} and {INDEX}, and only one of them can be the adapter"
            raise LaunchError(where, problem, "Move the leftover one out of the folder.")
        files = _shards(folder, where)
    if (folder / kt_training.FILE).is_file():
        files.append(folder / kt_training.FILE)
    return files or _complain(folder, where)


def iterate_files(folder: Path) -> Iterator[Path]:
    """The files that make up an adapter, for a content key. Reads nothing but an index."""
    names = [ADAPTER_CONFIG, WEIGHTS, INDEX, kt_training.FILE]
    if not (folder / WEIGHTS).is_file():
        names += sorted(set((read_index(folder, "lora.path", INDEX) or {}).values()))
    for name in names:
        if (folder / name).is_file():
            yield folder / name


def _complain(folder: Path, where: str) -> list[Path]:
    """The error for a folder without a readable file: what is there instead."""
    pickles = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
    if pickles:
        problem = f"{folder} has {', '.join(pickles)}, a pickle, but {WEIGHTS} is expected"
        raise LaunchError(where, problem, "Save the adapter again with safe_serialization=True; it is not opened.")
    shards = sorted(file.name for file in folder.iterdir() if SHARD.fullmatch(file.name))
    if shards:
        raise LaunchError(where, f"{folder} has {shown(shards)}, but no {INDEX}, which says what is in them", AGAIN)
    raise LaunchError(where, f"{folder} has no {WEIGHTS}", "Choose the folder that PEFT's save_pretrained wrote.")


def _shards(folder: Path, where: str) -> list[Path]:
    """The shards that the index names, after checking that they hold what it says."""
    places = read_index(folder, where, INDEX) or {}
    names = sorted(set(places.values()))
    if not names:
        raise LaunchError(where, f"{folder / INDEX} names no file", AGAIN)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise LaunchError(where, f"{len(missing)} files that {INDEX} names are missing: {shown(missing)}", AGAIN)
    for name in names:
        _require_as_indexed(folder / name, places, where)
    return [folder / name for name in names]


def _require_as_indexed(shard: Path, places: Mapping[str, str], where: str) -> None:
    found = read_header(shard).tensors.keys()
    strays = [key for key in found if places.get(key) != shard.name]
    if strays:
        given = places.get(strays[0])
        other = f"gives to {given}" if given else "does not name"
        raise LaunchError(where, f"{shard.name} holds tensors that {INDEX} {other}: {shown(strays)}", AGAIN)
    absent = [key for key, name in places.items() if name == shard.name and key not in found]
    if absent:
        raise LaunchError(where, f"{shard.name} has no tensors that {INDEX} says are in it: {shown(absent)}", AGAIN)
