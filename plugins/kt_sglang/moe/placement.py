"""Which experts of a layer are resident on the model's device; all others run in kt_kernels.

The first N, or the N most used of a recorded profile. Both groups number their experts from 0 in the checkpoint's
order.

Shapes: T tokens, K top-k.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch

from kt_model.contract import EXPERT_PROFILE
from kt_model.expert_profile import ExpertProfile, chosen_name, read_profile

NOT_HERE = -1


@dataclass(frozen=True)
class Placement:
    """One layer's experts; `resident` in ascending order."""

    num_experts: int
    resident: tuple[int, ...] = ()
    _tables: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def on_cpu(self) -> tuple[int, ...]:
        """The experts of kt_kernels, ascending."""
        return tuple(sorted({*range(self.num_experts)} - {*self.resident}))

    @cached_property
    def cpu_numbers(self) -> tuple[int, ...]:
        """For each expert: its number in kt_kernels, -1 if it is resident; empty if none is."""
        if not self.resident:
            return ()
        numbers = {expert: number for number, expert in enumerate(self.on_cpu)}
        return tuple(numbers.get(expert, NOT_HERE) for expert in range(self.num_experts))

    def prepare(self, device: torch.device) -> None:
        """Copy the table to the device: no copies are possible during a capture."""
        if self.resident:
            self.resident_ids(torch.zeros(1, 1, dtype=torch.int32, device=device))

    def cpu_ids(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Numbers in kt_kernels; -1 for resident experts; negative ids are unchanged."""
        return self._numbers(ids_TK, "cpu", self.on_cpu) if self.resident else ids_TK

    def resident_ids(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Numbers among the resident experts; -1 for all others."""
        return self._numbers(ids_TK, "resident", self.resident)

    def _numbers(self, ids_TK: torch.Tensor, half: str, experts: Sequence[int]) -> torch.Tensor:
        key = half, ids_TK.device
        if key not in self._tables:
            table = torch.full((self.num_experts + 1,), NOT_HERE, dtype=torch.int32, device="cpu")
            numbers = torch.arange(len(experts), dtype=torch.int32, device="cpu")
            table[torch.tensor(experts, device="cpu") + 1] = numbers
            self._tables[key] = table.to(ids_TK.device)
        return self._tables[key].index_select(0, (ids_TK + 1).view(-1)).view(ids_TK.shape)  # -1 finds NOT_HERE


def placement_of(layer: int, num_experts: int, count: int) -> Placement:
    """The layer's `count` resident experts."""
    profile = _profile(os.environ.get(EXPERT_PROFILE, ""), num_experts) if count else None
    return Placement(num_experts, profile.most_used(layer, count) if profile else tuple(range(count)))


def name_of(count: int, num_experts: int) -> str:
    """Identifies a choice of resident experts; empty if there are none."""
    return chosen_name(_profile(os.environ.get(EXPERT_PROFILE, ""), num_experts), count)


@cache
def _profile(path: str, num_experts: int) -> ExpertProfile | None:
    return read_profile(Path(path), num_experts) if path else None
