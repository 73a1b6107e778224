"""action=quantize: quantizes a checkpoint's experts, one after another, into a folder."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kt_model.digests import stamps_of
from kt_model.errors import LaunchError
from kt_model.experts import PROJECTIONS, Bits, ExpertSource, as_tensors, fingerprint, float32_of, revision
from kt_model.installed import product
from kt_model.methods import method_of
from kt_model.tensors.writer import NAMES, ShardWriter, TensorSpec
from kt_model.weights.folder import MANIFEST, Arrays, array_name, dequantized, read_folder, shard_name
from kt_model.weights.identity import (
    Part,
    digest_of,
    expert_parts,
    layer_digest,
    read_layer,
    read_weights,
    remember_weights,
    require_same_weights,
    require_unchanged,
)
from kt_model.weights.manifests import EXPERTS_FORMAT, VERSION
from kt_model.weights.progress import Bar
from kt_model.weights.staging import StagedFolder

AHEAD = 4
"""The most experts in memory at once."""


@dataclass(frozen=True)
class Error:
    """Relative L2 error of a layer's weights, and of its worst expert."""

    relative_l2: float
    worst: float
    worst_expert: int


def quantize(source: ExpertSource, method: str, target: Path, threads: int = 2) -> bool:
    """Make the folder; False if it already exists, made from the same bytes. Resumes an interrupted attempt, as far as
    that was made from the same bytes."""
    base = source.base
    key = {"method": method_of(method).sglang_name, "fingerprint": fingerprint(source), "version": VERSION}
    with StagedFolder(target, key, MANIFEST) as staged:
        if staged.finished:
            _require_same_weights(source, method, target)
            return False
        before = stamps_of(base.files)
        with Bar("quantizing", source.expert_bytes()) as bar, ThreadPoolExecutor(threads) as pool:
            for layer in base.moe_layers:
                name = shard_name(layer)
                if not _is_of(source, layer, staged.pieces.get(name)):
                    facts = _write_layer(source, method, layer, staged.partial / name, bar, pool)
                    require_unchanged(source, before)
                    staged.done(name, facts)
                else:
                    bar.skip(source.layer_bytes(layer))
                bar.line(_told(layer, staged.pieces[name]))
                source.forget()
        layers = {layer: str(staged.pieces[shard_name(layer)]["source"]) for layer in base.moe_layers}
        staged.finish(_manifest(source, method) | {"weights": remember_weights(source, layers, before)})
    return True


def _is_of(source: ExpertSource, layer: int, piece: Any) -> bool:
    """Whether an earlier attempt made this layer from the checkpoint's present content. Reads the layer if the attempt
    has one."""
    return isinstance(piece, dict) and "source" in piece and piece["source"] == read_layer(source, layer)


def _require_same_weights(source: ExpertSource, method: str, target: Path) -> None:
    """Raise LaunchError unless the existing folder was made from the checkpoint's present content."""
    made_from = read_folder(target, method, source.base).manifest.weights
    if made_from is None:
        problem = "exists, made by an earlier version of kt-launch, which did not record all of what it was made from"
        raise LaunchError(str(target), problem, "Remove it and run kt-launch quantize again.")
    require_same_weights(target, made_from, source, read_weights(source))


def _manifest(source: ExpertSource, method: str) -> dict[str, Any]:
    base, form = source.base, method_of(method)
    return {
        "format": EXPERTS_FORMAT,
        "version": VERSION,
        "tool": product(),
        "method": form.sglang_name,
        "group": form.group,
        "bits": form.bits,
        "model": {
            "name": base.path.name,
            "family": base.family.name,
            "revision": revision(base.path),
            "experts": base.num_experts,
            "hidden": base.hidden_size,
            "intermediate": base.moe_intermediate_size,
            "layers": list(base.moe_layers),
        },
    }


def _told(layer: int, facts: Mapping[str, Any]) -> str:
    worst = f"worst expert {facts['worst_expert']} {facts['worst']:.2%}"
    return f"layer {layer}: relative L2 error {facts['relative_l2']:.2%}, {worst}"


def _write_layer(
    source: ExpertSource, method: str, layer: int, path: Path, bar: Bar, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    experts = _quantized(source, method, layer, pool)
    first = next(experts)
    errors, read = [], []
    with ShardWriter(path, _specs(layer, source.base.num_experts, first[0]), {"format": EXPERTS_FORMAT}) as writer:
        for expert, (arrays, wrong, digest) in enumerate(itertools.chain([first], experts)):
            for array, values in arrays.items():
                writer.write(array_name(layer, expert, array), values)
            errors.append(wrong)
            read.append(digest)
            bar.advance(source.layer_bytes(layer) // source.base.num_experts)
    error = _summary(errors)
    return {"bytes": writer.bytes, "sha256": writer.sha256, "source": layer_digest(read), **error.__dict__}


def _quantized(
    source: ExpertSource, method: str, layer: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Arrays, tuple[float, float], bytes]]:
    """Each expert's arrays with its squared error and squared norm, and the digest of its source; computed slightly
    ahead of the disk."""
    waiting: deque[Future[tuple[Arrays, tuple[float, float], bytes]]] = deque()
    for expert in range(source.base.num_experts):
        bits = source.read(layer, expert)
        waiting.append(pool.submit(_quantize_one, bits, method, expert_parts(source, layer, expert)))
        if len(waiting) >= AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _quantize_one(bits: dict[str, Bits], method: str, parts: list[Part]) -> tuple[Arrays, tuple[float, float], bytes]:
    import kt_kernels

    tensors = as_tensors(bits)
    arrays = kt_kernels.quantize_expert(tensors["gate"], tensors["up"], tensors["down"], method_of(method).sglang_name)
    ordered = {name: arrays[name] for part in PROJECTIONS for name in (part, f"{part}_scale")}
    return ordered, _error(bits, ordered, method), digest_of(parts)


def _error(bits: dict[str, Bits], arrays: Arrays, method: str) -> tuple[float, float]:
    wrong = norm = 0.0
    for part in PROJECTIONS:
        exact = float32_of(bits[part])
        found = dequantized(method_of(method), arrays[part], arrays[f"{part}_scale"], exact.shape[1])
        wrong += float(np.sum(np.square(found - exact), dtype=np.float64))
        norm += float(np.sum(np.square(exact), dtype=np.float64))
    return wrong, norm


def _summary(errors: list[tuple[float, float]]) -> Error:
    def relative(wrong: float, norm: float) -> float:
        return math.sqrt(wrong / norm) if norm else 0.0

    each = [relative(*one) for one in errors]
    worst = max(range(len(each)), key=each.__getitem__)
    return Error(relative(sum(w for w, _ in errors), sum(n for _, n in errors)), each[worst], worst)


def _specs(layer: int, experts: int, arrays: Arrays) -> list[TensorSpec]:
    return [
        TensorSpec(array_name(layer, expert, name), NAMES[str(values.dtype)], values.shape)
        for expert in range(experts)
        for name, values in arrays.items()
    ]
