"""A batch's choices of experts, sorted so that the rows of an expert and adapter slot are neighbors, and where these
rows end, for the grouped products of streamed.py; resident_adapters.py sorts the same way.

Shapes: T tokens, K top-k, P = T·K choices of an expert by a token, E experts, G groups of an expert: the bare base,
then each adapter slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from kt_sglang.moe.transfer import pinned

ALIGNED = 32
"""Each piece's ends start at a multiple of this."""


@dataclass
class Routing:
    """A batch's choices, sorted by expert and slot."""

    token_P: torch.Tensor
    """The token of each sorted choice."""
    place_P: torch.Tensor
    """The sorted row of each choice."""
    ends_EG: Any
    """On the host: the end of each group's rows."""
    edges: list[int]
    """The first row of each expert, and the end of the last one's. Before the first: choices of experts that are not
    here."""
    slots: list[int]
    """The batch's slots, ascending."""
    adapted: int
    """Choices of tokens with an adapter, of experts that are not here too."""

    @property
    def nowhere(self) -> int:
        """Choices of experts that are not here."""
        return self.edges[0]

    def begin(self, expert: int) -> int:
        return self.edges[expert]

    def end(self, expert: int) -> int:
        return self.edges[expert + 1]

    def hit(self) -> list[int]:
        """The experts in use, ascending."""
        edges = self.edges
        return [expert for expert in range(len(edges) - 1) if edges[expert + 1] > edges[expert]]


class Sorting:
    """A routing on its way to the host: which experts are used decides what is copied."""

    def __init__(self, ids_TK: torch.Tensor, slots_T: torch.Tensor | None, experts: int, slots: int) -> None:
        """ids: -1 is an expert that is not here, sorted like one before the first; slots: from -1, the bare base."""
        self._groups, self._experts = 1 + (slots if slots_T is not None else 0), experts
        keys, first = ids_TK, 0
        if slots_T is not None:
            keys, first = torch.add(slots_T.unsqueeze(-1), ids_TK, alpha=self._groups), -1
        order_P, self._place_P, ends = sorted_by(keys, first - self._groups - 1, first + experts * self._groups)
        self._ends, self._copied = _start_copy(ends)
        self._token_P = order_P // ids_TK.shape[1]

    def wait(self) -> Routing:
        if self._copied is not None:
            self._copied.synchronize()
        ends = self._ends.numpy()
        ends_by_group = ends[1:].reshape(1 + self._experts, self._groups)
        edges = ends_by_group[:, -1].tolist()
        present, adapted = self._slots(ends)
        return Routing(self._token_P, self._place_P, ends_by_group[1:], edges, present, adapted)

    def _slots(self, ends: Any) -> tuple[list[int], int]:
        """The slots that the experts here are used with, and all choices of tokens with a slot."""
        if self._groups == 1:
            return [], 0
        sizes = np.diff(ends).reshape(1 + self._experts, self._groups)[:, 1:]
        return np.flatnonzero(sizes[1:].sum(axis=0)).tolist(), int(sizes.sum())


def sorted_by(keys_TK: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort a batch's choices by integer keys, on the device and without synchronizing with it: the choice in each
    sorted row and the row of each choice, (P,) int64; the number of rows with a key of at most k, for each k from
    `first` to before `end`, int32. Choices with equal keys keep their order."""
    ordered, order_P = torch.sort(keys_TK.reshape(-1), stable=True)
    place_P = torch.empty_like(order_P).scatter_(0, order_P, _numbers(len(order_P), order_P.device))
    edges = _edges(first, end, ordered.dtype, ordered.device)
    return order_P, place_P, torch.searchsorted(ordered, edges, right=True, out_int32=True)


@cache
def _edges(first: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.arange(first, end, dtype=dtype, device=device)


@lru_cache(maxsize=4)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


def _start_copy(ends: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """On the host, once the event is over; None on a CPU device."""
    if not ends.is_cuda:
        return ends, None
    there = pinned(*ends.shape, dtype=ends.dtype).copy_(ends, non_blocking=True)
    return there, torch.cuda.current_stream(ends.device).record_event()


class GroupEnds:
    """The ends of each piece's groups of rows, counted from the piece's first row; copied to the device at once."""

    def __init__(self, routing: Routing, planned: Sequence[Sequence[int]], device: torch.device) -> None:
        parts = [part for experts in planned for part in _ends_of(routing, experts)]
        self._places, size = [], 0
        for part in parts:
            self._places.append(slice(size, size + len(part)))
            size += -(-len(part) // ALIGNED) * ALIGNED
        table = np.zeros(size, dtype=np.int32)
        for place, part in zip(self._places, parts, strict=True):
            table[place] = part
        self._table = to_device(torch.from_numpy(table), device)

    def base(self, at: int) -> torch.Tensor:
        """By expert of the piece with this number, int32."""
        return self._table[self._places[2 * at]]

    def by_slot(self, at: int) -> torch.Tensor:
        """By expert and slot, the base first."""
        return self._table[self._places[2 * at + 1]]


def _ends_of(routing: Routing, experts: Sequence[int]) -> tuple[Any, Any]:
    ends = routing.ends_EG[experts[0] : experts[-1] + 1]
    if len(ends) > len(experts):
        ends = ends[np.asarray(experts) - experts[0]]
    ends = ends - routing.begin(experts[0])
    columns = [0, *(slot + 1 for slot in routing.slots)] if routing.slots else []
    return ends[:, -1], ends[:, columns].reshape(-1)


def to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without synchronizing with the device."""
    if device.type == "cpu":
        return table
    return pinned(*table.shape, dtype=table.dtype).copy_(table).to(device, non_blocking=True)
