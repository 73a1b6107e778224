"""The adapters' part of a layer whose experts are streamed (streamed.py): the low-rank factors of a batch's slots,
copied from SGLang's pools and arranged for the grouped products.

Shapes: S slots of a batch, N experts, E' experts of the pools, H hidden size, I intermediate size, R the pools' rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kt_model.prefill_buffers import MOST_FACTOR_BYTES
from kt_sglang.moe.transfer import on_stream
from kt_sglang.prompts.streamed_routing import to_device
from kt_sglang.prompts.unpacking import ROWS, padded

ALIGNED = 64
"""Each pool's part of a copy starts at a multiple of so many values."""


@dataclass(frozen=True)
class Sizes:
    """Of the factors of one layer; the same in all layers."""

    hidden: int
    intermediate: int
    rank: int

    @property
    def expert_values(self) -> int:
        """In `Factors`, for one expert and slot."""
        r, h, i = padded(self.rank, 8), padded(self.hidden), padded(self.intermediate)
        return 2 * r * h + 2 * i * 2 * r + r * i + padded(self.hidden, ROWS) * r


class StagedPools:
    """The pools' slots that a batch uses in one layer, being copied to the device."""

    def __init__(
        self, layer: int, pools: Sequence[torch.Tensor], slots: Sequence[int], device: torch.device, stream: Any
    ) -> None:
        self.layer, self.slots = layer, list(slots)
        shapes = [(len(slots), *pool.shape[1:]) for pool in pools]
        starts = [0]
        for shape in shapes:
            starts.append(starts[-1] + padded(math.prod(shape), ALIGNED))
        with on_stream(stream):
            self._memory = torch.empty(starts[-1], dtype=pools[0].dtype, device=device)
            self._pools = [
                self._memory[start : start + math.prod(shape)].view(shape)
                for start, shape in zip(starts, shapes, strict=False)
            ]
            for there, pool in zip(self._pools, pools, strict=True):
                _copy_slots(there, pool, self.slots)
            self._copied = stream.record_event() if stream else None

    def arrived(self) -> list[torch.Tensor]:
        """The pools with S = len(slots), once the current stream may read them."""
        if self._copied is not None:
            stream = torch.cuda.current_stream()
            self._copied.wait(stream)
            self._memory.record_stream(stream)
        return self._pools


def _copy_slots(there: torch.Tensor, pool: torch.Tensor, slots: list[int]) -> None:
    """Neighbors in one copy."""
    first, last = slots[0], slots[-1]
    if last - first + 1 == len(slots):
        there.copy_(pool[first : last + 1], non_blocking=True)
        return
    for to, slot in enumerate(slots):
        there[to].copy_(pool[slot], non_blocking=True)


@dataclass
class Factors:
    """A batch's adapters for N experts in the form of the grouped products: for each expert the base, whose factors are
    zero, then each slot. G = N·(1 + S) groups; sizes padded."""

    groups_each: int
    gate_up_a: torch.Tensor
    """(G, 2R, H): gate's in the first rows, up's in the others."""
    gate_up_b: torch.Tensor
    """(G, 2I, 2R): gate's in the first rows and columns, up's in the others."""
    down_a: torch.Tensor
    """(G, R, I)."""
    down_b: torch.Tensor
    """(G, H, R)."""

    def part(self, first: int, count: int) -> Factors:
        """The factors of some of its experts."""
        here = slice(first * self.groups_each, (first + count) * self.groups_each)
        return Factors(
            self.groups_each, self.gate_up_a[here], self.gate_up_b[here], self.down_a[here], self.down_b[here]
        )


class FactorBuffer:
    """Memory for the factors of up to N experts and S slots, rewritten by each layer. What the layers leave as it is,
    the base's factors and the padding, was set to zero once."""

    def __init__(self, sizes: Sizes, slots: int, experts: int, device: torch.device) -> None:
        self.sizes, self.slots, self.experts = sizes, slots, experts
        r, h, i = padded(sizes.rank, 8), padded(sizes.hidden), padded(sizes.intermediate)
        shapes = (2, r, h), (2, i, 2, r), (r, i), (padded(sizes.hidden, ROWS), r)
        groups = experts * (1 + slots)
        memory = torch.zeros(groups * sizes.expert_values, dtype=torch.bfloat16, device=device)
        parts = memory.split([groups * math.prod(shape) for shape in shapes])
        a, b, da, db = (part.view(experts, 1 + slots, *shape) for part, shape in zip(parts, shapes, strict=True))
        self._all = Factors(
            1 + slots, a.view(-1, 2 * r, h), b.view(-1, 2 * i, 2 * r), da.view(-1, r, i), db.flatten(0, 1)
        )
        rank, hidden, inner = sizes.rank, sizes.hidden, sizes.intermediate
        self._gate_up_a = a[:, 1:, :, :rank, :hidden]
        self._gate_up_b = b[:, 1:].diagonal(0, 2, 4)[:, :, :inner, :rank]  # (N, S, I, R, 2)
        self._down_a, self._down_b = da[:, 1:, :rank, :inner], db[:, 1:, :hidden, :rank]
        self._parts: dict[tuple[int, int], Factors] = {}

    def holds(self, sizes: Sizes, slots: int, experts: int) -> bool:
        return (self.sizes, self.slots) == (sizes, slots) and experts <= self.experts

    def part(self, first: int, count: int) -> Factors:
        """The factors of some of its experts."""
        if (first, count) not in self._parts:
            self._parts[first, count] = self._all.part(first, count)
        return self._parts[first, count]

    def fill(self, pools: Sequence[torch.Tensor]) -> None:
        """From pools (S, N, …); what was here before must have been used on the current stream."""
        gate_up_a, gate_up_b, down_a, down_b = (pool.transpose(0, 1) for pool in pools)
        count = len(down_a)
        self._gate_up_a[:count].copy_(gate_up_a.unflatten(2, (2, -1)))
        self._gate_up_b[:count].copy_(gate_up_b.unflatten(2, (2, -1)).movedim(2, -1))
        self._down_a[:count].copy_(down_a)
        self._down_b[:count].copy_(down_b)


class Arranger:
    """Arranges factors for several pieces at a time, in memory that the layers share: launching from Python costs more
    than the GPU's work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: FactorBuffer | None = None

    def arranged(
        self, sizes: Sizes, staged: StagedPools, in_pools: Sequence[int], planned: Sequence[Sequence[int]]
    ) -> Iterator[Factors]:
        """For each piece. One piece's factors are overwritten by later ones: they must be used in this order, on one
        stream. in_pools: for each expert its number in the pools; empty if they are the same."""
        pools, slots = staged.arrived(), len(staged.slots)
        most = max(1, MOST_FACTOR_BYTES // ((1 + slots) * sizes.expert_values * 2))
        for some in _together(planned, most):
            experts = [expert for piece in some for expert in piece]
            room, first = self._room(sizes, slots, len(experts)), 0
            room.fill(_chosen(pools, in_pools, experts))
            for piece in some:
                yield room.part(first, len(piece))
                first += len(piece)

    def _room(self, sizes: Sizes, slots: int, experts: int) -> FactorBuffer:
        if self._buffer is None or not self._buffer.holds(sizes, slots, experts):
            self._buffer = None  # its memory first
            self._buffer = FactorBuffer(sizes, slots, experts, self._device)
        return self._buffer


def _chosen(pools: Sequence[torch.Tensor], in_pools: Sequence[int], experts: Sequence[int]) -> Sequence[torch.Tensor]:
    """The pools (S, E', …) of these experts (S, N, …); without a copy if they are consecutive."""
    wanted = [in_pools[expert] for expert in experts] if in_pools else list(experts)
    first, last = wanted[0], wanted[-1]
    if wanted == list(range(first, last + 1)):
        return [pool[:, first : last + 1] for pool in pools]
    index = to_device(torch.tensor(wanted), pools[0].device)
    return [pool.index_select(1, index) for pool in pools]


def _together(pieces: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Consecutive pieces with at most so many experts in all, at least one piece."""
    some: list[Sequence[int]] = []
    for piece in pieces:
        if some and sum(map(len, some)) + len(piece) > most:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some
