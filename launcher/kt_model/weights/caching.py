"""The contents of the cache folder: packed experts (packed.py) and quantized ones (folder.py), each with its state.

Lists, verifies and prunes them; entries are made by those who use them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kt_model.digests import Digests
from kt_model.errors import LaunchError
from kt_model.weights import packed
from kt_model.weights.folder import MANIFEST, read_folder, read_method, verify_hashes
from kt_model.weights.locations import weights_root
from kt_model.weights.staging import is_being_written, remove_all_of

PARTIAL = ".partial"
WHOLE, MAKING, UNFINISHED, BROKEN = "whole", "being made", "unfinished", "broken"
DAY_S = 86400


@dataclass(frozen=True)
class Item:
    """A folder of the cache. kind: packed or quantized; problem: what is wrong with a broken one."""

    path: Path
    kind: str
    state: str
    bytes: int
    used_s: float
    """When it was last used by a server, or made: seconds since 1970."""
    made_from: str | None = None
    """The path of the folder that packed experts were read from, when they were packed."""
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(PARTIAL)


def read_cache(*, thorough: bool = False) -> list[Item]:
    """All items, by kind and name; one that is renamed or removed meanwhile is none. Reads no weights; with `thorough`,
    those whose hash is not cached."""
    with Digests() as digests:
        return [
            item
            for kind, root in (("packed", packed.packed_root()), ("quantized", weights_root()))
            for folder in (sorted(root.iterdir()) if root.is_dir() else [])
            if folder.is_dir() and (item := _describe_there(folder, kind, digests, thorough))
        ]


def _describe_there(folder: Path, kind: str, digests: Digests, thorough: bool) -> Item | None:
    with contextlib.suppress(FileNotFoundError):
        item = _describe(folder, kind, digests, thorough)
        return item if folder.is_dir() else None
    return None


def _size(folder: Path) -> int:
    """Of all files in it; those that are renamed or removed meanwhile count 0."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def _describe(folder: Path, kind: str, digests: Digests, thorough: bool) -> Item:
    size = _size(folder)
    manifest = folder / MANIFEST
    used_s = (manifest if manifest.is_file() else folder).stat().st_mtime
    target = folder.with_name(folder.name.removesuffix(PARTIAL))
    if folder.name.endswith(PARTIAL):
        return Item(folder, kind, MAKING if is_being_written(target) else UNFINISHED, size, used_s)
    try:
        _check(folder, kind, lambda file, written: digests.sha256(file) if thorough else digests.known(file) or written)
    except LaunchError as failure:
        return Item(folder, kind, BROKEN, size, used_s, problem=f"{failure.where}: {failure.problem}")
    made_from = packed.read_entry(folder).manifest.made_from if kind == "packed" else None
    return Item(folder, kind, WHOLE, size, used_s, made_from)


def _check(folder: Path, kind: str, sha256: Callable[[Path, str], str]) -> None:
    """Raise LaunchError if the folder does not match its manifest. sha256: called with a file and what was written."""
    if kind == "packed":
        entry = packed.read_entry(folder)
        entry.verify(lambda file: sha256(file, entry.manifest.shards[file.name].sha256))
        return
    whole = read_folder(folder, read_method(folder), None, where=str(folder))
    verify_hashes(whole, lambda file: sha256(file, whole.manifest.shards[file.name].sha256))


def verify(item: Item) -> str | None:
    """Read a whole item again, whatever is cached about it; returns what is wrong, or None. The next start learns the
    result too."""
    with Digests() as digests:
        try:
            _check(item.path, item.kind, lambda file, _: digests.read(file))
        except LaunchError as failure:
            return f"{failure.where}: {failure.problem}"
    return None


def choose_pruned(items: list[Item], days: float | None, max_bytes: int | None) -> Iterator[tuple[Item, str]]:
    """The items to prune, with reasons: unusable ones; packed items unused for so many days; and the longest unused
    ones until the remaining packed ones are no larger than the limit."""
    packed_rest = []
    for item in items:
        if item.state in (BROKEN, UNFINISHED):
            yield item, item.problem or item.state
        elif item.kind == "packed" and item.state == WHOLE:
            packed_rest.append(item)
    total = sum(item.bytes for item in packed_rest)
    for item in sorted(packed_rest, key=lambda item: item.used_s):
        idle_days = (time.time() - item.used_s) / DAY_S
        if days is not None and idle_days > days:
            yield item, f"not used for {idle_days:.0f} days"
        elif max_bytes is not None and total > max_bytes:
            yield item, "over cache.max_gib, and unused for the longest time"
        else:
            continue
        total -= item.bytes


def prune(item: Item) -> bool:
    """Remove it, unless a process is making it. A server that has it mapped is not affected."""
    return remove_all_of(item.path.with_name(item.name))
