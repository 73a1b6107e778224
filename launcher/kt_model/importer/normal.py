"""The normal form of an adapter: one pair per module, A (r, in) and B (out, r), with its own scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kt_model.errors import LaunchError, LaunchErrors
from kt_model.importer.layouts import Order
from kt_model.importer.names import PROJECTIONS, BaseModule
from kt_model.tensors.stored import Float32, Stored

KINDS = ("routed_experts", "shared_experts", "attention", "dense_mlp", "router", "embeddings")


@dataclass(frozen=True)
class Pair:
    """A low-rank update of one module: ΔW = scale · B·A. source: the file's name for the module."""

    target: BaseModule
    a: Stored
    b: Stored
    scale: float
    source: str

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    def delta(self, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """ΔW (out, in), or some of its rows."""
        scaled_b = self.b[rows].float32().astype(np.float64) * self.scale
        return (scaled_b @ self.a.float32().astype(np.float64)).astype(np.float32)

    def transposed(self) -> Pair:
        """The pair whose ΔW is the transpose of this one's."""
        return replace(self, a=self.b.T, b=self.a.T)

    def forget(self) -> None:
        """Release the pages of its files that were read."""
        self.a.forget()
        self.b.forget()

    def norm(self) -> float:
        """Frobenius norm of ΔW, from r × r products only."""
        a, b = self.a.float32().astype(np.float64), self.b.float32().astype(np.float64)
        return abs(self.scale) * math.sqrt(max(0.0, float(np.sum((a @ a.T) * (b.T @ b)))))


@dataclass(frozen=True)
class Imported:
    """One imported adapter. keys: how many keys of its files were used for what; refused: key and reason."""

    path: Path
    format: str
    pairs: Mapping[str, Pair] = field(repr=False)
    keys: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()
    alpha: float = 0.0
    """lora_alpha as adapter_config.json has it."""
    rank_stabilized: bool = False
    order: Order | None = None
    """The order of fused experts' columns, if it has any."""
    bytes: int = 0
    warnings: tuple[str, ...] = ()
    problems: tuple[LaunchError, ...] = ()

    def require_sound(self) -> Imported:
        """Raise all of its problems, if there are any."""
        if self.problems:
            raise LaunchErrors(list(self.problems))
        return self

    @cached_property
    def experts(self) -> dict[tuple[int, str], dict[int, Pair]]:
        """(layer, projection) -> expert -> pair."""
        found: dict[tuple[int, str], dict[int, Pair]] = {}
        for pair in self.pairs.values():
            target = pair.target
            if target.kind == "routed_experts" and target.layer is not None and target.expert is not None:
                found.setdefault((target.layer, target.projection), {})[target.expert] = pair
        return found

    @property
    def expert_layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.experts})

    def of_kind(self, kind: str) -> Iterator[Pair]:
        return (pair for pair in self.pairs.values() if pair.target.kind == kind)

    @property
    def largest_rank(self) -> int:
        return max((pair.rank for pair in self.pairs.values()), default=0)

    def absent_experts(self, num_experts: int) -> dict[tuple[int, str], int]:
        """Projections for which a layer has some experts but not all: how many are missing."""
        return {place: num_experts - len(found) for place, found in self.experts.items() if len(found) < num_experts}

    def zero_filled(self, num_experts: int) -> int:
        """Expert projections that it lacks in the layers that it changes."""
        found = sum(len(experts) for experts in self.experts.values())
        return len(self.expert_layers) * len(PROJECTIONS) * num_experts - found

    def stacked(
        self, layer: int, projection: str, num_experts: int, rank: int | None = None
    ) -> tuple[Float32, Float32] | None:
        """A (E, r, in) and B (E, out, r) of all experts, each scale folded into B; None when it has none of them.

        Lower ranks are padded with zeros, which adds nothing, and so is an absent expert.
        """
        found = self.experts.get((layer, projection))
        if not found:
            return None
        one = next(iter(found.values()))
        rank = rank or max(pair.rank for pair in found.values())
        a = np.zeros((num_experts, rank, one.in_features), np.float32)
        b = np.zeros((num_experts, one.out_features, rank), np.float32)
        for expert, pair in found.items():
            a[expert, : pair.rank] = pair.a.float32()
            b[expert, :, : pair.rank] = pair.b.float32() * np.float32(pair.scale)
        return a, b
