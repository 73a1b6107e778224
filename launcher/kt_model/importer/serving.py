"""Converts an adapter for SGLang: one rank and one scale for all, experts stacked, fused groups complete.

SGLang supports one rank and one alpha per adapter, so lower ranks are padded with zeros, and other scales are folded
into their B. It fuses q/k/v, gate/up and q_a/kv_a and expects each group complete, so a missing member is filled with
zeros.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.adapter_capacity import EXPERT_MODULES
from kt_model.adapters import AUTO_LAYOUT
from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError
from kt_model.importer.names import BaseModule
from kt_model.importer.normal import KINDS, Imported, Pair
from kt_model.tensors.stored import Stored

FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
EXPERT_GROUPS = (("gate", "up"), ("down",))
PREFIX = "base_model.model.model."
Values = npt.NDArray[np.uint16] | npt.NDArray[np.float32]

NOT_SERVED: Mapping[str, str] = {
    "router": "SGLang has no LoRA on routers",
    "shared_expert_gate": "SGLang has no LoRA on the gate of a shared expert",
}
"""Parts that SGLang supports in no model, and why."""
DENSE_BESIDE_EXPERTS = "SGLang has no LoRA on dense layers of a model without shared experts"


def layout_of(folder: Path, options: Mapping[str, Any]) -> str:
    """The layout typed for the adapter in this folder, else for all adapters; else auto."""
    return options.get("layouts", {}).get(os.path.realpath(folder)) or options.get("layout", AUTO_LAYOUT)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tensor:
    """One tensor for SGLang. dtype BF16: the bits of a bfloat16; F32: float32."""

    name: str
    array: Values
    dtype: str


def part_of(target: BaseModule) -> str:
    """The name under which a part of an adapter can be ignored: a kind, or the module that is not served."""
    last = target.module.rpartition(".")[2]
    return last if last in NOT_SERVED else target.kind


def unserved_parts(imported: Imported, base: Checkpoint | None) -> dict[str, str]:
    """Part -> why SGLang does not serve it, for the parts that this adapter has."""
    parts = {part_of(pair.target) for pair in imported.pairs.values()}
    reasons = dict(NOT_SERVED)
    if base is not None and not base.shared_experts:
        reasons["dense_mlp"] = DENSE_BESIDE_EXPERTS
    return {part: why for part, why in reasons.items() if part in parts}


def require_served(imported: Imported, base: Checkpoint | None, ignore: Sequence[str], where: str) -> None:
    """Raise for a part that SGLang does not serve, unless the user ignores it, and for an ignored part that does not
    exist."""
    known = {*KINDS, *NOT_SERVED}
    for part in ignore:
        if part not in known:
            raise LaunchError("lora.ignore", f"no part named {part}", f"Choose from {', '.join(sorted(known))}.")
    left = {part: why for part, why in unserved_parts(imported, base).items() if part not in ignore}
    if left:
        reasons = "; ".join(f"{part} ({why})" for part, why in left.items())
        names = ",".join([*ignore, *left])
        problem = f"parts of it cannot be served: {reasons}"
        raise LaunchError(where, problem, f"Set lora.ignore=[{names}] to serve the rest.")


def without(imported: Imported, ignore: Sequence[str]) -> Imported:
    """The adapter without ignored parts."""
    kept = {
        name: pair
        for name, pair in imported.pairs.items()
        if pair.target.kind not in ignore and part_of(pair.target) not in ignore
    }
    return replace(imported, pairs=kept)


def lead_scale(pairs: Iterable[Pair]) -> float:
    """The scale that most modules have."""
    counts = Counter(pair.scale for pair in pairs)
    return counts.most_common(1)[0][0] if counts else 1.0


def served_scale(pairs: Iterable[Pair]) -> float:
    """The scale that SGLang applies; never zero, since the others are folded into B relative to it."""
    return lead_scale(pair for pair in pairs if pair.scale)


def config_for_sglang(imported: Imported) -> dict[str, object]:
    """adapter_config.json as SGLang should see it."""
    rank = imported.largest_rank
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": served_scale(imported.pairs.values()) * rank,
        "target_modules": sorted(target_modules(imported)),
        "bias": "none",
        "use_rslora": False,
    }


def target_modules(imported: Imported) -> set[str]:
    """Modules that it changes, by SGLang's names."""
    names = set()
    for pair in imported.pairs.values():
        if pair.target.kind == "routed_experts":
            names |= {*EXPERT_MODULES}
        else:
            names.add(pair.target.module.rpartition(".")[2])
    return names


def tensors_for_sglang(imported: Imported, base: Checkpoint) -> Iterator[Tensor]:
    """All tensors, each computed on demand."""
    rank, scale = imported.largest_rank, served_scale(imported.pairs.values())
    for layer in imported.expert_layers:
        for group in EXPERT_GROUPS:
            if any((layer, projection) in imported.experts for projection in group):
                for projection in group:
                    yield from _stacked(
                        imported.experts.get((layer, projection), {}), layer, projection, base, rank, scale
                    )
    rest = {name: pair for name, pair in imported.pairs.items() if pair.target.kind != "routed_experts"}
    for name, pair in rest.items():
        yield from _padded(name, pair, rank, scale)
    for name, (out, inside) in _absent_members(rest, base).items():
        yield from _both(name, np.zeros((rank, inside), np.uint16), np.zeros((out, rank), np.uint16))


def _stacked(
    found: Mapping[int, Pair], layer: int, projection: str, base: Checkpoint, rank: int, scale: float
) -> Iterator[Tensor]:
    """A (E, R, in) and B (E, out, R) of one projection."""
    wide = (base.moe_intermediate_size, base.hidden_size)
    out, inside = wide[::-1] if projection == "down" else wide
    kept = all(_is_kept(pair, scale) for pair in found.values())
    a = np.zeros((base.num_experts, rank, inside), np.uint16 if kept else np.float32)
    b = np.zeros((base.num_experts, out, rank), a.dtype)
    for expert, pair in found.items():
        a[expert, : pair.rank] = _values(pair.a, kept)
        b[expert, :, : pair.rank] = _values(pair.b, kept, pair.scale / scale)
    yield from _both(f"layers.{layer}.mlp.experts.{projection}_proj", a, b)


def _padded(name: str, pair: Pair, rank: int, scale: float) -> Iterator[Tensor]:
    kept = _is_kept(pair, scale)
    a = np.zeros((rank, pair.in_features), np.uint16 if kept else np.float32)
    b = np.zeros((pair.out_features, rank), a.dtype)
    a[: pair.rank] = _values(pair.a, kept)
    b[:, : pair.rank] = _values(pair.b, kept, pair.scale / scale)
    yield from _both(name, a, b)


def _both(module: str, a: Values, b: Values) -> Iterator[Tensor]:
    for side, array in (("A", a), ("B", b)):
        yield Tensor(f"{PREFIX}{module}.lora_{side}.weight", array, "BF16" if array.dtype == np.uint16 else "F32")


def _is_kept(pair: Pair, scale: float) -> bool:
    """Whether the stored bits can be passed on unchanged."""
    return pair.a.dtype == pair.b.dtype == "BF16" and pair.scale == scale


def _values(stored: Stored, kept: bool, factor: float = 1.0) -> Values:
    return stored.array if kept else stored.float32() * np.float32(factor)


def _absent_members(rest: Mapping[str, Pair], base: Checkpoint) -> dict[str, tuple[int, int]]:
    """Missing members of fused groups that the adapter has in part: name -> (out, in)."""
    absent = {}
    for name in rest:
        stem, _, last = name.rpartition(".")
        for group in FUSED_GROUPS:
            for member in group if last in group else ():
                other = f"{stem}.{member}"
                shape = base.tensors.get(f"model.{other}.weight")
                if other not in rest and shape is not None:
                    absent[other] = (shape.shape[0], shape.shape[1])
    return absent
