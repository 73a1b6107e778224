"""The exact identity of quantized experts' source: digests of all bytes of a checkpoint's routed experts, scales
included.

They do not depend on how experts are distributed over files, so re-sharding or fusing gives the same checkpoint. A
layer's digest is computed while its experts are quantized (quantizing.py), or by reading them; the digest of all is
cached for the files' present state.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kt_model.atomic_file import DiskError
from kt_model.digests import Cancelled, Digests, Stamps, stamps_of
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource
from kt_model.families import expert_weights
from kt_model.float8 import FLOAT8
from kt_model.tensors.header import Tensor
from kt_model.weights.progress import Bar

Part = tuple[str, npt.NDArray[np.uint8]]
"""Type and shape of a tensor, and its bytes."""


class ChangedMeanwhile(DiskError):
    """Another process is writing what is read. What was made so far is kept, and verified before it is continued."""


def expert_parts(source: ExpertSource, layer: int, expert: int) -> list[Part]:
    """gate, up and down as stored, each followed by its scale if it has one; mapped, not read."""
    names = expert_weights(source.base.family, layer, expert)
    parts = [part for name in names for part in source.with_scale(name)]
    return [(_type(source.located[part].tensor), source.as_shaped(part)) for part in parts]


def _type(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.shape}\n"


def digest_of(parts: Iterable[Part]) -> bytes:
    """SHA-256 of an expert's parts. Reads them."""
    state = hashlib.sha256()
    for kind, content in parts:
        state.update(kind.encode())
        state.update(content.data)
    return state.digest()


def layer_digest(experts: Iterable[bytes]) -> str:
    """A layer's digest, from those of its experts in order."""
    return hashlib.sha256(b"".join(experts)).hexdigest()


def read_layer(source: ExpertSource, layer: int, cancel: threading.Event | None = None) -> str:
    """A layer's digest. Reads all of the layer. Raises Cancelled."""
    digests = []
    for expert in range(source.base.num_experts):
        if cancel is not None and cancel.is_set():
            raise Cancelled(str(source.base.path))
        digests.append(digest_of(expert_parts(source, layer, expert)))
    source.forget()
    return layer_digest(digests)


def whole_digest(source: ExpertSource, layers: Mapping[int, str]) -> str:
    """The digest of all routed experts, from those of the layers."""
    state = hashlib.sha256()
    if source.base.expert_dtype == FLOAT8:
        state.update(f"blocks of {source.base.float8_block}\n".encode())
    for layer in source.base.moe_layers:
        state.update(f"{layer} {layers[layer]}\n".encode())
    return state.hexdigest()


def known_weights(source: ExpertSource) -> str | None:
    """The digest of all, if it is cached for the files' present state; reads nothing."""
    with Digests() as digests:
        return digests.known_together(_what(source), source.base.files)


def read_weights(source: ExpertSource, cancel: threading.Event | None = None, *, quiet: bool = False) -> str:
    """The digest of all: the cached one, or computed now by reading all routed experts; quiet: without a bar. Raises
    Cancelled."""
    return known_weights(source) or _read_all(source, cancel, quiet)


def require_same_weights(folder: Path, made_from: str | None, source: ExpertSource, weights: str | None) -> None:
    """Raises LaunchError if a folder was made from another digest than the checkpoint's. None: unknown."""
    if None not in (made_from, weights) and made_from != weights:
        problem = f"was made from other weights than those of {source.base.path}"
        fix = "Remove it and run kt-launch quantize, or choose another folder."
        raise LaunchError(str(folder), problem, fix)


def _read_all(source: ExpertSource, cancel: threading.Event | None, quiet: bool) -> str:
    before = stamps_of(source.base.files)
    layers = {}
    with Bar("reading", source.expert_bytes(), quiet=quiet) as bar:
        for layer in source.base.moe_layers:
            layers[layer] = read_layer(source, layer, cancel)
            bar.advance(source.layer_bytes(layer))
    return remember_weights(source, layers, before)


def remember_weights(source: ExpertSource, layers: Mapping[int, str], before: Stamps) -> str:
    """The digest of all from layers that have been read. before: the files' stamps before that. Raises ChangedMeanwhile
    if a file has changed: some layers may then be old and some new."""
    require_unchanged(source, before)
    found = whole_digest(source, layers)
    with Digests() as digests:
        digests.remember_together(_what(source), before, found)
    return found


def require_unchanged(source: ExpertSource, before: Stamps) -> None:
    """Raises ChangedMeanwhile if a file of the checkpoint has changed."""
    if stamps_of(source.base.files) != before:
        problem = "was changed while it was read"
        raise ChangedMeanwhile(str(source.base.path), problem, "Run it again when nothing writes there.")


def _what(source: ExpertSource) -> str:
    """Distinguishes digests of the same files: which layers config.json calls routed, and how scales are divided."""
    base = source.base
    facts = f"{base.family.name} {base.moe_layers} {base.num_experts} {base.float8_block}"
    return f"experts {hashlib.sha256(facts.encode()).hexdigest()[:16]}"
