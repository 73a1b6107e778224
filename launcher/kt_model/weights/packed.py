"""The packed cache: files with experts in the kernels' own layout, which a later start maps instead of packing them
again.

An entry is a folder with one file per layer and a manifest, and gets its name only when it is complete. The name, and
the key in the manifest, depend on content alone: the hashes of the weights' files, the method, and the kernels' layout.
A file is safetensors with the tensors part.0, part.1, …, one per pool's shard, each at a multiple of ALIGNMENT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.digests import Digests, Stamps, stamps_of
from kt_model.errors import LaunchError
from kt_model.installed import product
from kt_model.methods import method_of
from kt_model.tensors.folder import weight_files
from kt_model.tensors.header import read_header
from kt_model.tensors.writer import ShardWriter, TensorSpec
from kt_model.user_paths import cache_root
from kt_model.weights.folder import MANIFEST, shard_name
from kt_model.weights.manifests import PACKED_FORMAT, VERSION, PackedManifest, read_manifest
from kt_model.weights.staging import StagedFolder, is_being_written

ALIGNMENT = 4096
"""A page, so that a part can be mapped and loading its first bytes touches no other part's page."""
PIECE_BYTES = 1 << 24
"""Bytes per write; a thread that writes in the background lets others run in between."""

Part = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CacheKey:
    """The packed experts that one process serves."""

    weight_path: Path
    """The checkpoint, or the folder of quantized experts."""
    method: str
    layout: str
    """Everything besides the weights that the bytes depend on, as the kernels describe it."""
    resident: str = ""
    """Which experts are left out (expert_profile.chosen_name)."""
    tp_rank: int = 0
    tp_size: int = 1

    def with_digests(self, sha256: Callable[[Path], str | None]) -> dict[str, Any] | None:
        """The content that names the entry; None if `sha256` does not know a file's digest."""
        weights = self._weights(sha256)
        if weights is None:
            return None
        facts = {name: value for name, value in asdict(self).items() if name != "weight_path"}
        facts["method"] = method_of(self.method).sglang_name
        return {"weights": weights, **facts, "version": VERSION}

    def _weights(self, sha256: Callable[[Path], str | None]) -> str | None:
        """One digest of all files that the experts are read from; a quantized folder records its own."""
        if method_of(self.method).quantized:
            manifest = self.weight_path / MANIFEST
            shards = json.loads(manifest.read_text())["shards"] if manifest.is_file() else {}
            found = [str(facts["sha256"]) for facts in shards.values()]
        else:
            digests = [sha256(file) for file in weight_files(self.weight_path)]
            found = [digest for digest in digests if digest is not None]
            if len(found) < len(digests):
                return None
        if not found:
            return None
        return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()

    def stamps(self) -> Stamps:
        """Stamps of the files that the experts are read from, now. Raises OSError and LaunchError."""
        if method_of(self.method).quantized:
            return stamps_of([self.weight_path / MANIFEST, *self.weight_path.glob("layer-*.safetensors")])
        return stamps_of(weight_files(self.weight_path))

    def folder(self, key: Mapping[str, Any]) -> Path:
        """The path of this key's entry, whether or not it exists."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return packed_root() / f"{method_of(self.method).sglang_name}-{digest[:24]}"


def packed_root() -> Path:
    return cache_root() / "packed"


@dataclass(frozen=True)
class Entry:
    """A complete entry."""

    path: Path
    manifest: PackedManifest
    stamps: Stamps = field(default_factory=list, compare=False, repr=False)
    """Stamps of its files, when the entry was read."""

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards.values())

    @property
    def layers(self) -> list[int]:
        return sorted(shard.layer for shard in self.manifest.shards.values())

    def intermediate_size(self, layer: int) -> int:
        """Rows of gate that the layer's experts were packed from."""
        return self.manifest.shards[shard_name(layer)].intermediate

    def map_layer(self, layer: int) -> list[Part]:
        """The parts of a layer, mapped read-only; the kernel is asked to read ahead what is not in memory."""
        file = read_header(self.path / shard_name(layer))
        with file.path.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        pages.madvise(mmap.MADV_WILLNEED)
        mapped = np.frombuffer(pages, np.uint8)
        found = []
        for number in range(self.manifest.shards[shard_name(layer)].parts):
            tensor = file.tensors.get(f"part.{number}")
            if tensor is None:
                raise _unsound(file.path, f"has no part.{number}")
            found.append(mapped[file.data_start + tensor.start : file.data_start + tensor.end])
        return found

    def verify(self, sha256: Callable[[Path], str]) -> None:
        """Raise LaunchError for the first file that differs from what was written."""
        for name, shard in self.manifest.shards.items():
            found = sha256(self.path / name)
            if found != shard.sha256:
                wrote = shard.sha256[:16]
                raise _unsound(self.path / name, f"has SHA-256 {found[:16]}…, but {wrote}… was written")

    def used(self) -> None:
        """Record that it is in use, for pruning by age. A read-only cache stays as it is."""
        with contextlib.suppress(OSError):
            os.utime(self.path / MANIFEST)


def _unsound(path: Path, problem: str) -> LaunchError:
    return LaunchError(str(path), problem, "Run kt-launch cache cache.do=prune.")


def read_entry(path: Path, key: Mapping[str, Any] | None = None) -> Entry:
    """An entry whose files exist with the right sizes; otherwise raises LaunchError. Reads no weights."""
    none = _unsound(path, "is not an entry of the packed cache, or an incomplete one")
    manifest = read_manifest(path / MANIFEST, PackedManifest, none)
    if key is not None and manifest.key.model_dump() != json.loads(json.dumps(key)):
        raise _unsound(path, "was packed from something else")
    for name, shard in manifest.shards.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise _unsound(file, f"is missing or not the {shard.bytes} bytes that were written")
    return Entry(path, manifest, [stamps_of([path / name])[0] for name in manifest.shards])


def find_entry(cache_key: CacheKey) -> Entry | None:
    """The entry, if it exists and is sound. Reads no weights unless an entry has changed since it was written. Raises
    LaunchError for an unsound one. Also None if the weights' hashes are not known yet."""
    with Digests() as digests:
        key = cache_key.with_digests(digests.known)
        if key is None or not cache_key.folder(key).is_dir():
            return None
        entry = read_entry(cache_key.folder(key), key)
        entry.verify(digests.sha256)
    return entry


def discard(cache_key: CacheKey) -> None:
    """Remove the entry, which is known to be unsound. Servers that have it mapped keep their mapping."""
    with Digests() as digests:
        key = cache_key.with_digests(digests.known)
    if key is not None:
        shutil.rmtree(cache_key.folder(key), ignore_errors=True)


@dataclass(frozen=True)
class CacheStatus:
    """What a start will find in the cache."""

    folder: Path | None
    """Path of the entry; None while its name is not known."""
    state: str
    problem: str | None = None
    """Why no entry can be written."""


def cache_status(cache_key: CacheKey, needed_bytes: int) -> CacheStatus:
    """For a plan: reads no weights."""
    with Digests() as digests:
        key = cache_key.with_digests(digests.known)
        if key is None:
            return CacheStatus(None, "named once the first start has hashed the weights", _why_not(needed_bytes))
        folder = cache_key.folder(key)
        if not folder.is_dir():
            return CacheStatus(folder, "does not exist yet, written during the next start", _why_not(needed_bytes))
        try:
            entry = read_entry(folder, key)
            entry.verify(lambda file: digests.known(file) or entry.manifest.shards[file.name].sha256)
        except LaunchError as failure:
            return CacheStatus(folder, f"unsound ({failure.problem}), will be written again", _why_not(needed_bytes))
    return CacheStatus(folder, f"there, {entry.bytes / 2**30:.2f} GiB, mapped at the start")


def _why_not(needed_bytes: int) -> str | None:
    """What prevents writing an entry, as far as that can be known beforehand."""
    place = packed_root()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return f"{packed_root()} cannot be written, so the next start packs the experts again"
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        sizes = f"{needed_bytes / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free"
        return f"the disk of {packed_root()} is too full ({sizes}), so the next start packs the experts again"
    return None


@dataclass(frozen=True)
class PackedLayer:
    """What one layer's kernel object holds."""

    layer: int
    intermediate: int
    parts: Sequence[Part]


def write_entry(
    cache_key: CacheKey,
    layers: Sequence[PackedLayer],
    pause: Callable[[], None] = lambda: None,
    before: Stamps | None = None,
) -> Entry:
    """Write the entry from memory; an existing sound one is left as it is. Raises LaunchError for a full disk, an
    unwritable folder, or weights that have changed since they were packed. pause: called between pieces; before: the
    weights' stamps before they were packed."""
    with Digests() as digests:
        key = cache_key.with_digests(digests.sha256)
        assert key is not None
        if before is not None and cache_key.stamps() != before:
            raise LaunchError(str(cache_key.weight_path), "was changed while it was loaded", "Start the server again.")
        folder = cache_key.folder(key)
        with contextlib.suppress(LaunchError):
            return read_entry(folder, key)
        if is_being_written(folder):
            raise LaunchError(str(folder), "is being written by another process", "The next start will find it.")
        shutil.rmtree(folder, ignore_errors=True)
        with StagedFolder(folder, key, MANIFEST) as staged:
            for one in layers if not staged.finished else ():
                if shard_name(one.layer) not in staged.pieces:
                    staged.done(shard_name(one.layer), _write_layer(staged.partial, one, pause))
            if not staged.finished:
                staged.finish(_manifest(cache_key))
        return read_entry(folder, key)


def _manifest(cache_key: CacheKey) -> dict[str, Any]:
    return {"format": PACKED_FORMAT, "tool": product(), "from": str(cache_key.weight_path), "method": cache_key.method}


def _write_layer(folder: Path, one: PackedLayer, pause: Callable[[], None]) -> dict[str, Any]:
    specs = list(_specs(one.parts))
    with ShardWriter(folder / shard_name(one.layer), specs, {"format": PACKED_FORMAT}, ALIGNMENT) as writer:
        for number, part in enumerate(one.parts):
            writer.write_pieces(f"part.{number}", _pieces(part, pause))
            if part.nbytes % ALIGNMENT:
                writer.write(f"fill.{number}", np.zeros(-part.nbytes % ALIGNMENT, np.uint8))
    facts = {"layer": one.layer, "parts": len(one.parts), "intermediate": one.intermediate}
    return {"bytes": writer.bytes, "sha256": writer.sha256, **facts}


def _specs(parts: Sequence[Part]) -> Iterator[TensorSpec]:
    for number, part in enumerate(parts):
        yield TensorSpec(f"part.{number}", "U8", (part.nbytes,))
        if part.nbytes % ALIGNMENT:
            yield TensorSpec(f"fill.{number}", "U8", (-part.nbytes % ALIGNMENT,))


def _pieces(part: Part, pause: Callable[[], None]) -> Iterator[Part]:
    for start in range(0, part.nbytes, PIECE_BYTES):
        yield part[start : start + PIECE_BYTES]
        pause()


def remember_digests(entry: Entry) -> None:
    """Cache the files' hashes as of the writing of the entry, without reading them; works once their last change has
    settled. The next start reads those that have changed since."""
    with Digests() as digests:
        for identity, shard in zip(entry.stamps, entry.manifest.shards.values(), strict=True):
            digests.remember(identity, shard.sha256)
