"""Which tensor-parallel rank computes the CPU experts: each computes its part of every expert, or, with
kt.tp_experts=rank0, the first rank computes all of them. The others then add zeros to SGLang's own all-reduce, and hold
no such weights.

Not here: resident experts, which SGLang splits among ranks in both cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch

from kt_model.contract import RANK0, TP_EXPERTS
from kt_sglang.moe.layers import LAYERS
from kt_sglang.moe.placement import Placement


class Cut(Protocol):
    """SGLang's MoE layer, or its pool of adapters."""

    moe_tp_rank: int
    moe_tp_size: int


def part_of(owner: Cut) -> tuple[int, int] | None:
    """This process's part of every CPU expert, as rank and number of parts; None if it has no part."""
    if os.environ.get(TP_EXPERTS) != RANK0:
        return int(owner.moe_tp_rank), int(owner.moe_tp_size)
    return None if owner.moe_tp_rank else (0, 1)


class ExpertsOfRank0:
    """Replaces one layer's CPU experts on a rank without any: nothing is read, stored or computed here."""

    top_k = 1
    mapped = is_complete = False
    from_elsewhere = is_part = True

    def __init__(self, layer_id: int, placement: Placement) -> None:
        self.layer_id, self.placement = layer_id, placement
        LAYERS.weights[layer_id] = self

    @property
    def moe(self) -> NoReturn:
        raise self._nothing_here()

    @property
    def cache_key(self) -> NoReturn:
        raise self._nothing_here()

    def _nothing_here(self) -> RuntimeError:
        return RuntimeError(f"layer {self.layer_id}: the CPU experts are those of the first rank")

    def loader(self, resident_loader: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that passes resident experts, by their numbers, to SGLang's own loader."""
        return only_residents(self.placement, resident_loader)


def only_residents(placement: Placement, resident_loader: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's loader for resident experts, by their numbers; CPU experts are skipped."""
    residents = {expert: number for number, expert in enumerate(placement.resident)}
    on_cpu = {*placement.on_cpu}

    def load(
        param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, **extra: Any
    ) -> Any:
        if expert_id in on_cpu:
            return None
        number = residents.get(expert_id, expert_id)
        return resident_loader(param, loaded_weight, weight_name, shard_id, number, **extra)

    return load
