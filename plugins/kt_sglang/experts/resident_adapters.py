"""The adapters' part of resident experts (resident.py), added by hooks between and after the two products.

gathered: each choice's factors are copied side by side. Nothing synchronizes, or allocates or branches depending on
          values, so that a CUDA graph can capture it; but a choice moves as many bytes as its factors have.
grouped:  choices are sorted by slot and expert, and factors multiply their rows from where they are (streamed_sums.py),
          so that they are read once for all of their rows. For large batches that no graph captures.

Shapes: T tokens, K top-k, P = T·K choices of an expert by a token, N resident experts, S adapter slots, G = S·N groups,
R the pools' rank, padded, H hidden size, I intermediate size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch

from kt_sglang.decode import captured
from kt_sglang.moe.reference import Factors
from kt_sglang.prompts.streamed_routing import sorted_by
from kt_sglang.prompts.streamed_sums import MOST_GROUPS, add_rows, grouped
from kt_sglang.prompts.unpacking import padded

logger = logging.getLogger(__name__)
MOST_GATHERED_BYTES = 1 << 28
"""Bytes of factors that are gathered at a time, and of rows that are grouped at a time."""
LEAST_GROUPED_BYTES = 200 << 20
"""Batches whose factors would take this much gathered are grouped. On an H200 the hooks of a layer of DeepSeek-V2-Lite
with rank 8 took 0.54 and 0.57 ms gathered and grouped at 192 tokens, 0.62 and 0.58 at 256, 1.07 and 0.57 at 512; 212
tokens take this much."""
ALIGNED = 8
"""Its rows start at multiples of so many values."""
CAPABILITIES = (9, 10)
"""Major compute capabilities that have a kernel for it; elsewhere torch loops over the groups."""
SAME = 2.0**-6
"""Largest relative L2 difference of the two ways: a few roundings to bfloat16, whose products are summed in another
order. A wrong row or factor makes it about 1."""


class Hooks(Protocol):
    """SGLang's LoRAHooks: both change the output of a product in place. A choice of a non-resident expert has id -1,
    and its rows may hold anything."""

    def after_gate_up(
        self, x_TH: torch.Tensor, out_TKI: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        """Gate and up, side by side in the last dimension, before the activation."""

    def after_down(
        self, inner_PI: torch.Tensor, out_TKH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        """Down; each choice's output is already multiplied by its weight."""


class ResidentAdapters:
    """The resident experts' adapter factors for all slots of one layer, on the model's device. An empty slot is zero,
    and so are ranks that only pad. The buffers keep their addresses: graphs read them."""

    def __init__(self, slots: int, experts: int, rank: int, hidden: int, inner: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros((slots * experts, *shape), dtype=torch.bfloat16, device=device)

        self.slots, self.experts, self.rank = slots, experts, padded(rank, ALIGNED)
        self.hidden, self.inner = hidden, inner
        self.gate_up_a, self.gate_up_b = zeros(2 * self.rank, hidden), zeros(2, inner, self.rank)
        self.down_a, self.down_b = zeros(self.rank, inner), zeros(hidden, self.rank)
        self._can_group = False

    def prepare(self) -> None:
        """Find out whether batches can be grouped, before anybody is served."""
        self._can_group = _can_group(self)

    @property
    def pools(self) -> tuple[torch.Tensor, ...]:
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    @property
    def expert_bytes(self) -> int:
        """Of one expert's factors in one slot."""
        return sum(pool[0].nbytes for pool in self.pools)

    def fill(self, slot: int, factors: Factors) -> None:
        """Store one adapter's factors of all resident experts, (N, …), B scaled; all of the same rank as before."""
        gate_a, gate_b, up_a, up_b, down_a, down_b = factors
        at, rank = slice(slot * self.experts, (slot + 1) * self.experts), gate_a.shape[1]
        self.gate_up_a[at].unflatten(1, (2, -1))[:, :, :rank].copy_(torch.stack((gate_a, up_a), dim=1))
        self.gate_up_b[at, ..., :rank].copy_(torch.stack((gate_b, up_b), dim=1))
        self.down_a[at, :rank].copy_(down_a)
        self.down_b[at, ..., :rank].copy_(down_b)

    def empty(self, slot: int) -> None:
        """Clear this slot."""
        for pool in self.pools:
            pool[slot * self.experts : (slot + 1) * self.experts].zero_()

    def hooks(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, slots_T: torch.Tensor) -> Hooks:
        """The hooks that add a batch's adapters; slots_T: -1 for none."""
        return GroupedHooks(self, slots_T) if self._are_grouped(x_TH, ids_TK) else GatheredHooks(self, slots_T)

    def _are_grouped(self, x_TH: torch.Tensor, ids_TK: torch.Tensor) -> bool:
        """The one place that decides. A warm-up forward does what the capture after it will do."""
        if not self._can_group or ids_TK.numel() * self.expert_bytes < LEAST_GROUPED_BYTES:
            return False
        return not (captured.is_capturing(x_TH) or captured.is_warming_up(x_TH))


@dataclass(frozen=True)
class GatheredHooks:
    """Copies each choice's factors."""

    adapters: ResidentAdapters
    slots_T: torch.Tensor

    def after_gate_up(
        self, x_TH: torch.Tensor, out_TKI: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        pools = self.adapters

        def add(rows: slice, at: torch.Tensor, here: torch.Tensor) -> None:
            x = x_TH[rows].repeat_interleave(ids_TK.shape[1], dim=0)
            low = torch.bmm(pools.gate_up_a[at], x.unsqueeze(-1)).view(len(at), 2, pools.rank, 1)
            delta = torch.matmul(pools.gate_up_b[at], low)
            self._add(out_TKI[rows], delta, here)

        self._in_pieces(ids_TK, pools.gate_up_a[0].nbytes + pools.gate_up_b[0].nbytes, add)

    def after_down(
        self, inner_PI: torch.Tensor, out_TKH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        pools, top_k = self.adapters, ids_TK.shape[1]

        def add(rows: slice, at: torch.Tensor, here: torch.Tensor) -> None:
            inner = inner_PI[rows.start * top_k : rows.stop * top_k].unsqueeze(-1)
            delta = torch.bmm(pools.down_b[at], torch.bmm(pools.down_a[at], inner))
            self._add(out_TKH[rows], delta * weights_TK[rows].reshape(-1, 1, 1), here)

        self._in_pieces(ids_TK, pools.down_a[0].nbytes + pools.down_b[0].nbytes, add)

    def _in_pieces(
        self, ids_TK: torch.Tensor, bytes_each: int, add: Callable[[slice, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """`add` in blocks of rows: which factors each choice uses, and whether it uses any."""
        for rows in _pieces(ids_TK, bytes_each):
            ids, slots = ids_TK[rows], self.slots_T[rows].unsqueeze(-1)
            here = (ids >= 0) & (slots >= 0)
            at = torch.where(here, slots * self.adapters.experts + ids, 0)
            add(rows, at.reshape(-1).long(), here)

    @staticmethod
    def _add(out_TKX: torch.Tensor, delta: torch.Tensor, here_TK: torch.Tensor) -> None:
        added = torch.where(here_TK.unsqueeze(-1), delta.reshape(out_TKX.shape), 0)
        out_TKX.add_(added.to(out_TKX.dtype))


@dataclass(frozen=True)
class _Sorted:
    """Some tokens' choices, sorted; choices of no adapter in these groups come last, after all ends."""

    tokens: slice
    choices: slice
    groups: slice
    choice_P: torch.Tensor
    """The choice of each row, counted from the first of these."""
    row_P: torch.Tensor
    """The row of each choice."""
    ends_G: torch.Tensor
    """int32."""


@dataclass
class GroupedHooks:
    """Multiplies the rows of an expert and slot by factors that stay where they are."""

    adapters: ResidentAdapters
    slots_T: torch.Tensor
    _pieces: list[_Sorted] = field(default_factory=list)

    def after_gate_up(
        self, x_TH: torch.Tensor, out_TKI: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        pools, rank, inner = self.adapters, self.adapters.rank, self.adapters.inner
        self._pieces = list(self._sorted(ids_TK))
        for piece in self._pieces:
            x_PH = x_TH[piece.tokens].index_select(0, piece.choice_P // ids_TK.shape[1])
            low_PR = grouped(x_PH, pools.gate_up_a[piece.groups], piece.ends_G)
            del x_PH
            out_PI, b_GIR = out_TKI.view(-1, 2 * inner)[piece.choices], pools.gate_up_b[piece.groups]
            for half in (0, 1):
                part_PR = low_PR[:, half * rank : (half + 1) * rank]
                delta_PI = grouped(part_PR, b_GIR[:, half], piece.ends_G)
                add_rows(out_PI[:, half * inner : (half + 1) * inner], delta_PI, piece.row_P, piece.ends_G)

    def after_down(
        self, inner_PI: torch.Tensor, out_TKH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        pools, weights_P = self.adapters, weights_TK.float().reshape(-1)
        for piece in self._pieces:
            rows_PI = inner_PI[piece.choices].index_select(0, piece.choice_P)
            low_PR = grouped(rows_PI, pools.down_a[piece.groups], piece.ends_G)
            del rows_PI
            delta_PH = grouped(low_PR, pools.down_b[piece.groups], piece.ends_G)
            out_PH = out_TKH.view(-1, pools.hidden)[piece.choices]
            add_rows(out_PH, delta_PH, piece.row_P, piece.ends_G, weights_P[piece.choices])

    def _sorted(self, ids_TK: torch.Tensor) -> Iterator[_Sorted]:
        """Both hooks' pieces: blocks of tokens and of slots."""
        pools = self.adapters
        row_bytes = 2 * (pools.hidden + pools.inner + 2 * pools.rank)
        slots_each = MOST_GROUPS // pools.experts
        for tokens in _pieces(ids_TK, row_bytes):
            for slot in range(0, pools.slots, slots_each):
                last = min(slot + slots_each, pools.slots)
                yield self._piece(ids_TK, tokens, slice(slot * pools.experts, last * pools.experts))

    def _piece(self, ids_TK: torch.Tensor, tokens: slice, groups: slice) -> _Sorted:
        experts, count, top_k = self.adapters.experts, groups.stop - groups.start, ids_TK.shape[1]
        ids_TK, slots_T = ids_TK[tokens], self.slots_T[tokens]
        group_TK = torch.add(
            ids_TK - groups.start, slots_T.unsqueeze(-1), alpha=experts
        )  # below 0: slot -1, or earlier
        here_TK = (ids_TK >= 0) & (ids_TK < experts) & (group_TK >= 0)
        keys_TK = torch.where(here_TK, group_TK, count).clamp_(max=count)
        choices = slice(tokens.start * top_k, tokens.stop * top_k)
        return _Sorted(tokens, choices, groups, *sorted_by(keys_TK, 0, count))


def _pieces(ids_TK: torch.Tensor, bytes_each: int) -> Iterator[slice]:
    """Blocks of tokens whose choices take at most MOST_GATHERED_BYTES."""
    tokens, top_k = ids_TK.shape
    step = max(1, MOST_GATHERED_BYTES // (bytes_each * top_k))
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def _can_group(adapters: ResidentAdapters) -> bool:
    sizes, device = (adapters.hidden, adapters.inner), adapters.gate_up_a.device
    if adapters.experts > MOST_GROUPS or any(size % ALIGNED for size in sizes):
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in CAPABILITIES:
        return False
    return _groups_right(adapters.hidden, adapters.inner, adapters.rank, device)


@cache
def _groups_right(hidden: int, inner: int, rank: int, device: torch.device) -> bool:
    """Whether grouping gives what gathering gives, tried once with random factors; this also compiles what it needs
    before anybody is served. If not, all batches are gathered, with a warning."""
    try:
        difference = _difference(hidden, inner, rank, device)
    except Exception as failure:  # any failure of the GPU's kernels or their compiler: the other way is used
        logger.warning("adapters of resident experts are gathered: %s: %s", type(failure).__name__, failure)
        return False
    if not difference <= SAME:
        logger.warning("adapters of resident experts are gathered: grouped, they differ by %.2g", difference)
    return difference <= SAME


def _difference(hidden: int, inner: int, rank: int, device: torch.device) -> float:
    """Relative L2 difference of what both kinds of hooks add to gate, up and down."""
    slots, experts, tokens, top_k = 2, 2, 24, 2
    dice = torch.Generator("cpu").manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice, device="cpu").bfloat16().to(device)

    def choose(first: int, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(first, end, shape, generator=dice, device="cpu").int().to(device)

    adapters = ResidentAdapters(slots, experts, rank, hidden, inner, device)
    for pool in adapters.pools:
        pool.copy_(draw(*pool.shape))
    x_TH, inner_PI, weights_TK = draw(tokens, hidden), draw(tokens * top_k, inner), draw(tokens, top_k).float()
    ids_TK, slots_T = choose(-1, experts, tokens, top_k), choose(-1, slots, tokens)
    added = []
    for hooks in (GatheredHooks(adapters, slots_T), GroupedHooks(adapters, slots_T)):
        gate_up_TKI = torch.zeros(tokens, top_k, 2 * inner, dtype=torch.bfloat16, device=device)
        down_TKH = torch.zeros(tokens, top_k, hidden, dtype=torch.bfloat16, device=device)
        for chosen_TK in (torch.full_like(ids_TK, -1), ids_TK):  # of nobody's choices all groups are empty
            hooks.after_gate_up(x_TH, gate_up_TKI, weights_TK, chosen_TK)
            hooks.after_down(inner_PI, down_TKH, weights_TK, chosen_TK)
        added.append((gate_up_TKI.float(), down_TKH.float()))
    return max(float((one - other).norm() / one.norm()) for one, other in zip(*added, strict=True))
