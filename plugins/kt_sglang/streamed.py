"""Computes a long batch of one MoE layer on the GPU: packed experts are copied from host memory in pieces, on a stream
of their own, unpacked there and multiplied, adapters included, while the next piece is copied. Only experts that the
batch uses are copied; if it uses all of them, the next layer's first pieces are copied before its router runs.

Also runs on a CPU device, sequentially. Not here: when it is used and how it is proven (prefill.py), the packed layout
(unpacking.py).

Shapes: T tokens, K top-k, P = T·K choices of an expert by a token, E experts, H hidden size, I intermediate size, S
adapter slots of SGLang's pools, R their rank.
"""

from __future__ import annotations

import ctypes
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

import kt_kernels
from kt_model.prefill_buffers import MOST_FACTOR_BYTES
from kt_sglang.streamed_sums import silu_and_mul, weighted_sum
from kt_sglang.transfer import pinned
from kt_sglang.unpacking import ROWS, Shard, padded, piece_bytes, shards_of

READ_ONLY = 0x08
"""CU_MEMHOSTREGISTER_READ_ONLY, for GPU access. The only flag that works for mapped files, and ten times faster."""
ALREADY_REGISTERED = 712
"""Registered by others, who may unregister it: such memory is copied without registration, more slowly."""


_registered: list[torch.Tensor] = []
"""Memory registered for direct reads by the GPU, kept forever: if it were freed while registered, the GPU would read
the old pages, whatever is at that address by then."""


class CannotStream(Exception):
    """Why the experts of this process cannot be streamed to the GPU."""


@dataclass
class LayerSource:
    """One layer's packed experts in host memory, and SGLang's pools of its adapters."""

    layer: int
    hidden: int
    intermediate: int
    shards: Sequence[Shard]
    packed: Sequence[torch.Tensor]
    """By shard: uint8 (E, expert_bytes)."""
    pools: tuple[torch.Tensor, ...] = ()
    """gate_up A (S, E', 2R, H) and B (S, E', 2I, R), down A (S, E', R, I) and B (S, E', H, R); see lora.py."""
    in_pools: Sequence[int] = ()
    """For each expert: its number in the pools; empty if they are the same."""
    following: LayerSource | None = None
    """The next layer that a batch needs; after the last layer the first, for the next batch."""
    is_last: bool = False

    @classmethod
    def of(cls, layer: int, moe: kt_kernels.MoE, number_format: str) -> LayerSource:
        """A view of what kt_kernels holds for a layer."""
        arrays = moe.packed_shards()
        shards = shards_of(number_format, moe.hidden_size, moe.intermediate_size, len(arrays))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about read-only arrays
            packed = [torch.from_numpy(array) for array in arrays]
        for shard, data in zip(shards, packed, strict=True):
            if data.nbytes != shard.expert_bytes * moe.num_experts:
                expected = shard.expert_bytes * moe.num_experts
                raise CannotStream(f"layer {layer}: {data.nbytes} packed bytes, expected {expected}")
        return cls(
            layer,
            moe.hidden_size,
            moe.intermediate_size,
            shards,
            [data.view(moe.num_experts, -1) for data in packed],
        )

    @property
    def experts(self) -> int:
        return len(self.packed[0])

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.shards), self.hidden, self.intermediate

    @property
    def slots(self) -> int:
        return int(self.pools[0].shape[0]) if self.pools else 0


def register(memory: torch.Tensor, *, read_only: bool) -> None:
    """Register existing host memory, including mapped files, so that the GPU reads it at the link's full rate. Raises
    CannotStream with CUDA's error number. read_only: nobody writes it any more; otherwise, pages that were never
    written would be replaced when somebody writes them."""
    if not memory.nbytes:
        return
    begin = memory.data_ptr() // 4096 * 4096
    size = padded(memory.data_ptr() + memory.nbytes - begin, 4096)
    status = _driver().cuMemHostRegister_v2(begin, size, READ_ONLY if read_only else 0)
    if status and read_only:
        status = _driver().cuMemHostRegister_v2(begin, size, 0)  # not every driver supports the flag
    if status not in (0, ALREADY_REGISTERED):
        raise CannotStream(f"{size / 2**30:.1f} GiB of host memory cannot be registered (cuMemHostRegister: {status})")
    _registered.append(memory)


@cache
def _driver() -> ctypes.CDLL:
    """The driver's library, found at run time. Unlike the runtime's, its errors are not reported again by the next
    kernel launch."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    return driver


@dataclass
class Piece:
    """Some experts of a layer in one of the ring's buffers."""

    experts: Sequence[int]
    at: int
    by_shard: Sequence[torch.Tensor]
    copied: Any


class Ring:
    """Ring of device buffers for pieces."""

    def __init__(self, shards: Sequence[Shard], experts: int, count: int, device: torch.device) -> None:
        self.count, self.experts_each = count, experts
        self._buffers = [
            [torch.empty(experts, shard.expert_bytes, dtype=torch.uint8, device=device) for shard in shards]
            for _ in range(count)
        ]
        self._free: list[Any] = [None] * count
        self._next = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for buffer in self._buffers for part in buffer)

    def bring(self, source: LayerSource, experts: Sequence[int]) -> Piece:
        """Start a copy; at most `count` pieces may be in flight at a time."""
        at, self._next = self._next, (self._next + 1) % self.count
        buffer = self._buffers[at]
        with _on(self.stream):
            if self._free[at] is not None:
                self._free[at].wait()
            for to, packed in zip(buffer, source.packed, strict=True):
                for first, run in _runs(experts):
                    to[first : first + len(run)].copy_(packed[run.start : run.stop], non_blocking=True)
            copied = self._event()
        return Piece(experts, at, [part[: len(experts)] for part in buffer], copied)

    def release(self, piece: Piece) -> None:
        """Record that the work now on the current stream is the last to read this piece."""
        self._free[piece.at] = self._event()

    def _event(self) -> Any:
        return torch.cuda.current_stream().record_event() if self.stream else None


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    with torch.cuda.stream(stream) if stream else nullcontext():
        yield


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Runs of consecutive experts: position of the first, and the experts."""
    first = 0
    for at in range(1, len(experts) + 1):
        if at == len(experts) or experts[at] != experts[at - 1] + 1:
            yield first, range(experts[first], experts[at - 1] + 1)
            first = at


@dataclass
class Routing:
    """A batch's choices, sorted by expert and, with adapters, by slot. Row p of the sorted ones is choice
    order_P[p]."""

    order_P: torch.Tensor
    token_P: torch.Tensor
    ends_EG: Any
    """On the host: the end of each (expert, slot) group's rows; G starts with the bare base."""
    nowhere: int
    """Choices of experts that are not here; they come first."""
    slots: list[int]
    """The batch's slots, ascending."""
    adapted: int
    """Choices of tokens with an adapter."""

    @classmethod
    def of(cls, ids_TK: torch.Tensor, slots_T: torch.Tensor | None, experts: int, slots: int) -> Routing:
        """Synchronizes with the device: which experts are used decides what is copied."""
        groups = 1 + (slots if slots_T is not None else 0)
        keys = ids_TK.long()
        if slots_T is not None:
            keys = keys * groups + slots_T.long().clamp(min=-1).unsqueeze(-1) + 1
        keys = torch.where(ids_TK < 0, -1, keys).reshape(-1)
        ordered, order_P = torch.sort(keys, stable=True)
        edges = torch.arange(-1, experts * groups, device=keys.device)
        ends = torch.searchsorted(ordered, edges, right=True).cpu().numpy()
        ends_EG = ends[1:].reshape(experts, groups)
        sizes = np.diff(ends).reshape(experts, groups).sum(axis=0)
        present = [slot for slot in range(groups - 1) if sizes[slot + 1]]
        return cls(order_P, order_P // ids_TK.shape[1], ends_EG, int(ends[0]), present, int(sizes[1:].sum()))

    def begin(self, expert: int) -> int:
        return int(self.ends_EG[expert - 1, -1]) if expert else self.nowhere

    def end(self, expert: int) -> int:
        return int(self.ends_EG[expert, -1])

    def places_TK(self, shape: torch.Size) -> torch.Tensor:
        """The sorted row of each choice."""
        place_P = torch.empty_like(self.order_P)
        place_P[self.order_P] = torch.arange(len(self.order_P), device=self.order_P.device)
        return place_P.view(shape)

    def hit(self) -> list[int]:
        """The experts in use, ascending."""
        return [e for e in range(len(self.ends_EG)) if self.end(e) > self.begin(e)]


class StagedPools:
    """The pools' slots that a batch uses in one layer, being copied to the device."""

    def __init__(self, source: LayerSource, slots: Sequence[int], device: torch.device, stream: Any) -> None:
        self.layer, self.slots = source.layer, list(slots)
        with _on(stream):
            self._pools = [_on_device(pool, self.slots, device) for pool in source.pools]
            self._copied = stream.record_event() if stream else None

    def arrived(self) -> list[torch.Tensor]:
        """The pools with S = len(slots), once the current stream may read them."""
        if self._copied is not None:
            self._copied.wait()
            for pool in self._pools:
                pool.record_stream(torch.cuda.current_stream())
        return self._pools


def _on_device(pool: torch.Tensor, slots: list[int], device: torch.device) -> torch.Tensor:
    """Some slots of a pool; neighbors in one copy."""
    first, last = slots[0], slots[-1]
    if slots == list(range(first, last + 1)):
        return pool[first : last + 1].to(device, non_blocking=True)
    return torch.stack([pool[slot].to(device, non_blocking=True) for slot in slots])


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

    @classmethod
    def of(cls, pools: Sequence[torch.Tensor], source: LayerSource, experts: Sequence[int]) -> Factors:
        """From the result of `StagedPools.arrived`."""
        gate_up_a, gate_up_b, down_a, down_b = (each.transpose(0, 1) for each in _chosen(pools, source, experts))
        count, slots, rank = len(experts), gate_up_a.shape[1], down_a.shape[2]
        hidden, inner = source.hidden, source.intermediate
        r, h, i = padded(rank, 8), padded(hidden), padded(inner)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros((count, 1 + slots, *shape), dtype=torch.bfloat16, device=down_a.device)

        a, b, da, db = zeros(2, r, h), zeros(2, i, 2, r), zeros(r, i), zeros(padded(hidden, ROWS), r)
        a[:, 1:, :, :rank, :hidden] = gate_up_a.unflatten(2, (2, rank))
        for side in range(2):
            b[:, 1:, side, :inner, side, :rank] = gate_up_b[:, :, side * inner : (side + 1) * inner]
        da[:, 1:, :rank, :inner] = down_a
        db[:, 1:, :hidden, :rank] = down_b
        return cls(1 + slots, a.view(-1, 2 * r, h), b.view(-1, 2 * i, 2 * r), da.view(-1, r, i), db.flatten(0, 1))

    def part(self, first: int, count: int) -> Factors:
        """The factors of some of its experts."""
        here = slice(first * self.groups_each, (first + count) * self.groups_each)
        return Factors(
            self.groups_each, self.gate_up_a[here], self.gate_up_b[here], self.down_a[here], self.down_b[here]
        )


def _chosen(pools: Sequence[torch.Tensor], source: LayerSource, experts: Sequence[int]) -> Sequence[torch.Tensor]:
    """The pools (S, E', …) of these experts (S, N, …); without a copy if they are consecutive."""
    wanted = [source.in_pools[expert] for expert in experts] if source.in_pools else list(experts)
    first, last = wanted[0], wanted[-1]
    if wanted == list(range(first, last + 1)):
        return [pool[:, first : last + 1] for pool in pools]
    index = _to_device(torch.tensor(wanted), pools[0].device)
    return [pool.index_select(1, index) for pool in pools]


def _factor_bytes(source: LayerSource, slots: int) -> int:
    """Of one expert's `Factors`."""
    r, h, i = padded(source.pools[2].shape[2], 8), padded(source.hidden), padded(source.intermediate)
    return (1 + slots) * r * (2 * h + 4 * 2 * i + i + h) * 2


def grouped(rows_PK: torch.Tensor, weights_GNK: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """rows @ weightsᵀ, each group's rows with its weights; ends_G int32, on the device of the rows. (P, N)."""
    if rows_PK.is_cuda:
        return torch._grouped_mm(rows_PK, weights_GNK.transpose(-2, -1), offs=ends_G)
    out = rows_PK.new_empty(len(rows_PK), weights_GNK.shape[1])
    begin = 0
    for weights_NK, end in zip(weights_GNK, ends_G.tolist(), strict=True):
        torch.mm(rows_PK[begin:end], weights_NK.T, out=out[begin:end])
        begin = end
    return out


@dataclass
class Counts:
    """Counters."""

    batches: int = 0
    tokens: int = 0
    adapter_tokens: int = 0
    bytes: int = 0
    """Bytes of packed experts that were copied."""


@dataclass
class _Layer:
    """One layer's run: state shared by its pieces."""

    source: LayerSource
    x_TH: torch.Tensor
    weights_TK: torch.Tensor
    routing: Routing
    out_PH: torch.Tensor
    staged: StagedPools | None
    counts: Counts = field(default_factory=Counts)


class Streamer:
    """State shared by the layers of one process: the ring of packed pieces, and the buffer for an unpacked one. All
    layers have the same shape."""

    def __init__(self, source: LayerSource, experts_each: int, buffers: int, device: torch.device) -> None:
        """buffers: at least two, one being multiplied and one being filled."""
        self.shape, self.device = source.shape, device
        self.ring = Ring(source.shards, experts_each, buffers, device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        h, i = padded(source.hidden), padded(source.intermediate)
        self._gate_up = torch.zeros(experts_each, 2, i, h, dtype=torch.bfloat16, device=device)
        self._down = torch.zeros(experts_each, padded(source.hidden, ROWS), i, dtype=torch.bfloat16, device=device)
        self._ahead: tuple[int, deque[Piece]] = (-1, deque())
        self._staged_ahead: StagedPools | None = None

    @property
    def bytes(self) -> int:
        """Bytes on the device between two batches."""
        return self.ring.bytes + int(self._gate_up.nbytes + self._down.nbytes)

    def run(
        self,
        source: LayerSource,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_T: torch.Tensor | None = None,
        counts: Counts | None = None,
    ) -> torch.Tensor:
        """Σ_k weight·expert(x), (T, H) in the dtype of x. Ids are the source's numbers, negative ones are ignored;
        slots -1: no adapter. Changes no input."""
        routing = Routing.of(ids_TK, slots_T if source.pools else None, source.experts, source.slots)
        hidden = source.hidden
        x = pad(x_TH.to(torch.bfloat16), (0, padded(hidden) - hidden)) if hidden % 64 else x_TH.to(torch.bfloat16)
        run = _Layer(
            source,
            x,
            weights_TK.float().contiguous(),
            routing,
            torch.empty(ids_TK.numel(), padded(hidden, ROWS), dtype=torch.bfloat16, device=x.device),
            self._staged(source, routing.slots),
            counts or Counts(),
        )
        self._all_pieces(run)
        if (source.is_last or source.following is None) and routing.slots and self._side:
            self._side.synchronize()  # SGLang writes the pools between two batches
        run.counts.batches += 1
        run.counts.tokens += len(x_TH)
        run.counts.adapter_tokens += -(-routing.adapted // ids_TK.shape[1])
        out_TH = x_TH.new_empty(x_TH.shape)
        weighted_sum(out_TH, run.out_PH, routing.places_TK(ids_TK.shape), run.weights_TK, routing.nowhere)
        return out_TH

    def _staged(self, source: LayerSource, slots: list[int]) -> StagedPools | None:
        staged, self._staged_ahead = self._staged_ahead, None
        if not slots or (staged is not None and (staged.layer, staged.slots) == (source.layer, slots)):
            return staged if slots else None
        return StagedPools(source, slots, self.device, self._side)

    def _all_pieces(self, run: _Layer) -> None:
        source, hit = run.source, run.routing.hit()
        waiting = self._brought_ahead(source)
        there = {expert for piece in waiting for expert in piece.experts}
        to_come = _cut([expert for expert in hit if expert not in there], self.ring.experts_each)
        planned = [*(piece.experts for piece in waiting), *to_come]
        groups = _Groups(run.routing, planned, self.device)
        factors = _factors_of(run, planned)
        for at in range(len(planned)):
            while to_come and len(waiting) < self.ring.count:
                waiting.append(self._bring(run, to_come.popleft()))
            self._multiply(run, waiting.popleft(), groups, at, next(factors))
        if source.following is not None and len(hit) == source.experts and source.following.shape == self.shape:
            self._bring_ahead(run, source.following)

    def _bring(self, run: _Layer, experts: Sequence[int]) -> Piece:
        run.counts.bytes += piece_bytes(run.source.shards, len(experts))
        return self.ring.bring(run.source, experts)

    def _bring_ahead(self, run: _Layer, source: LayerSource) -> None:
        """As much as the ring holds, since this batch probably uses all experts there too. The adapters' factors first,
        which are small."""
        slots = run.routing.slots
        staged_bytes = len(slots) * sum(pool[0].nbytes for pool in source.pools)
        if staged_bytes and staged_bytes <= MOST_FACTOR_BYTES and not run.source.is_last:
            self._staged_ahead = StagedPools(source, slots, self.device, self._side)
        pieces = list(_cut(range(source.experts), self.ring.experts_each))[: self.ring.count]
        run.counts.bytes += piece_bytes(source.shards, sum(map(len, pieces)))
        self._ahead = (source.layer, deque(self.ring.bring(source, experts) for experts in pieces))

    def _brought_ahead(self, source: LayerSource) -> deque[Piece]:
        (layer, pieces), self._ahead = self._ahead, (-1, deque())
        if layer == source.layer:
            return pieces
        for piece in pieces:
            if piece.copied:
                piece.copied.wait()
            self.ring.release(piece)
        return deque()

    def _multiply(self, run: _Layer, piece: Piece, groups: _Groups, at: int, factors: Factors | None) -> None:
        if piece.copied:
            piece.copied.wait()
        rows = slice(run.routing.begin(piece.experts[0]), run.routing.end(piece.experts[-1]))
        count = len(piece.experts)
        gate_up, down = self._gate_up[:count], self._down[:count]
        if rows.start < rows.stop:
            for shard, packed in zip(run.source.shards, piece.by_shard, strict=True):
                shard.unpack(packed, gate_up, down)
        self.ring.release(piece)
        if rows.start == rows.stop:
            return
        x_PH = run.x_TH.index_select(0, run.routing.token_P[rows])
        ends = groups.base(at, rows.start)
        by_slot = groups.by_slot(at, rows.start) if factors else ends
        out = grouped(x_PH, gate_up.flatten(1, 2), ends)
        if factors:
            out += grouped(grouped(x_PH, factors.gate_up_a, by_slot), factors.gate_up_b, by_slot)
        inner = silu_and_mul(out)
        if not factors:
            run.out_PH[rows] = grouped(inner, down, ends)
            return
        out = grouped(inner, down, ends)
        low_rank = grouped(grouped(inner, factors.down_a, by_slot), factors.down_b, by_slot)
        torch.add(out, low_rank, out=run.out_PH[rows])


def _factors_of(run: _Layer, planned: Sequence[Sequence[int]]) -> Iterator[Factors | None]:
    """For each planned piece. Computed for several pieces at a time: launching from Python costs more than the GPU's
    work."""
    if run.staged is None:
        yield from [None] * len(planned)
        return
    pools = run.staged.arrived()
    most = max(1, MOST_FACTOR_BYTES // _factor_bytes(run.source, len(run.staged.slots)))
    for some in _together(planned, most):
        factors, first = Factors.of(pools, run.source, [expert for piece in some for expert in piece]), 0
        for piece in some:
            yield factors.part(first, len(piece))
            first += len(piece)


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


class _Groups:
    """The ends of groups of rows, by piece, copied to the device at once."""

    def __init__(self, routing: Routing, planned: Sequence[Sequence[int]], device: torch.device) -> None:
        experts = [expert for piece in planned for expert in piece]
        self._edges = np.cumsum([0, *map(len, planned)]).tolist()
        columns = [0, *(slot + 1 for slot in routing.slots)]
        table = np.concatenate(
            (routing.ends_EG[experts][:, -1:], routing.ends_EG[experts][:, columns]),
            axis=1,
        )
        self._table = _to_device(torch.from_numpy(table.astype(np.int32)), device)

    def _rows(self, at: int) -> torch.Tensor:
        return self._table[self._edges[at] : self._edges[at + 1]]

    def base(self, at: int, first: int) -> torch.Tensor:
        return self._rows(at)[:, 0] - first

    def by_slot(self, at: int, first: int) -> torch.Tensor:
        return (self._rows(at)[:, 1:] - first).reshape(-1)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without synchronizing with the device."""
    if device.type == "cpu":
        return table
    return pinned(*table.shape, dtype=table.dtype).copy_(table).to(device, non_blocking=True)


def _cut(experts: Sequence[int], each: int) -> deque[Sequence[int]]:
    return deque(experts[first : first + each] for first in range(0, len(experts), each))
