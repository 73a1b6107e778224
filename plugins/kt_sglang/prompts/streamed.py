"""Computes a long batch of one MoE layer on the GPU: packed experts are copied from host memory in pieces, on a stream
of their own, unpacked there and multiplied, adapters included, while the next piece is copied. Only experts that the
batch uses are copied; if it uses all of them, the next layer's first pieces are copied before its router runs.

Also runs on a CPU device, sequentially. Not here: when it is used and how it is proven (prefill.py), the packed layout
(unpacking.py), which rows are whose (streamed_routing.py), adapters' factors (streamed_factors.py).

Shapes: T tokens, K top-k, P = T·K choices of an expert by a token, E experts, H hidden size, I intermediate size, S
adapter slots of SGLang's pools, R their rank.
"""

from __future__ import annotations

import ctypes
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, repeat
from typing import Any

import torch
from torch.nn.functional import pad

import kt_kernels
from kt_model.prefill_buffers import MOST_FACTOR_BYTES
from kt_sglang.moe.transfer import on_stream
from kt_sglang.prompts.streamed_factors import Arranger, Factors, Sizes, StagedPools
from kt_sglang.prompts.streamed_routing import GroupEnds, Routing, Sorting
from kt_sglang.prompts.streamed_sums import MOST_GROUPS, grouped, silu_and_mul, weighted_sum
from kt_sglang.prompts.unpacking import ROWS, Shard, padded, piece_bytes, shards_of

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

    @property
    def factor_sizes(self) -> Sizes:
        return Sizes(self.hidden, self.intermediate, int(self.pools[2].shape[2]))


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
        with on_stream(self.stream):
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


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Runs of consecutive experts: position of the first, and the experts."""
    first = 0
    for at in range(1, len(experts) + 1):
        if at == len(experts) or experts[at] != experts[at - 1] + 1:
            yield first, range(experts[first], experts[at - 1] + 1)
            first = at


@dataclass
class Counts:
    """Counters."""

    batches: int = 0
    tokens: int = 0
    adapter_tokens: int = 0
    bytes: int = 0
    """Bytes of packed experts that were copied."""


@dataclass
class _Arranged:
    """Factors of a layer's pieces, and whose they are."""

    slots: list[int]
    by_piece: Iterator[Factors | None]


@dataclass
class _Layer:
    """One layer's run: state shared by its pieces."""

    source: LayerSource
    x_TH: torch.Tensor
    routing: Routing
    out_PH: torch.Tensor
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
        self._arranger = Arranger(device)
        self._unpackers: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._ahead: tuple[int, deque[Piece]] = (-1, deque())
        self._staged_ahead: StagedPools | None = None

    @property
    def bytes(self) -> int:
        """Bytes on the device, without adapters' factors."""
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
        """Σ_k weight·expert(x), (T, H) in the dtype of x. Ids are the source's numbers, -1 is ignored;
        slots -1: no adapter. Changes no input."""
        sorting = Sorting(ids_TK, slots_T if source.pools else None, source.experts, source.slots)
        waiting = self._brought_ahead(source)
        arranged = self._arranged_ahead(source, waiting)  # launched while the host waits for the routing
        routing = sorting.wait()
        hidden = source.hidden
        x = pad(x_TH.to(torch.bfloat16), (0, padded(hidden) - hidden)) if hidden % 64 else x_TH.to(torch.bfloat16)
        out_PH = torch.empty(ids_TK.numel(), padded(hidden, ROWS), dtype=torch.bfloat16, device=x.device)
        run = _Layer(source, x, routing, out_PH, counts or Counts())
        self._all_pieces(run, waiting, arranged)
        if (source.is_last or source.following is None) and routing.slots and self._side:
            self._side.synchronize()  # SGLang writes the pools between two batches
        run.counts.batches += 1
        run.counts.tokens += len(x_TH)
        run.counts.adapter_tokens += routing.adapted // ids_TK.shape[1]
        out_TH = x_TH.new_empty(x_TH.shape)
        weights_TK = weights_TK.float().contiguous()
        weighted_sum(out_TH, out_PH, routing.place_P.view(ids_TK.shape), weights_TK, routing.nowhere)
        return out_TH

    def _arranged_ahead(self, source: LayerSource, waiting: Sequence[Piece]) -> _Arranged | None:
        """The factors of the last layer's slots, if they are there and all pieces that the batch could need."""
        staged, self._staged_ahead = self._staged_ahead, None
        if staged is None or staged.layer != source.layer:
            return None
        if sum(len(piece.experts) for piece in waiting) < source.experts:
            self._staged_ahead = staged
            return None
        return self._arranged(source, staged, [piece.experts for piece in waiting])

    def _arranged(self, source: LayerSource, staged: StagedPools, planned: Sequence[Sequence[int]]) -> _Arranged:
        by_piece = self._arranger.arranged(source.factor_sizes, staged, source.in_pools, planned)
        return _Arranged(staged.slots, chain([next(by_piece)], by_piece))

    def _factors(
        self, run: _Layer, planned: Sequence[Sequence[int]], arranged: _Arranged | None
    ) -> Iterator[Factors | None]:
        """For each planned piece."""
        slots, staged = run.routing.slots, self._staged_ahead
        self._staged_ahead = None
        if not slots or not planned:
            return repeat(None)
        if arranged is None or arranged.slots != slots:
            if staged is None or (staged.layer, staged.slots) != (run.source.layer, slots):
                staged = StagedPools(run.source.layer, run.source.pools, slots, self.device, self._side)
            arranged = self._arranged(run.source, staged, planned)
        return arranged.by_piece

    def _all_pieces(self, run: _Layer, waiting: deque[Piece], arranged: _Arranged | None) -> None:
        source, hit = run.source, run.routing.hit()
        there = {expert for piece in waiting for expert in piece.experts}
        to_come = _cut([expert for expert in hit if expert not in there], self.ring.experts_each)
        planned = [*(piece.experts for piece in waiting), *to_come]
        parts = [_cut(experts, max(1, MOST_GROUPS // (1 + len(run.routing.slots)))) for experts in planned]
        ends = GroupEnds(run.routing, [part for some in parts for part in some], self.device)
        factors, at = self._factors(run, planned, arranged), 0
        for some in parts:
            while to_come and len(waiting) < self.ring.count:
                waiting.append(self._bring(run, to_come.popleft()))
            self._multiply(run, waiting.popleft(), some, ends, at, next(factors))
            at += len(some)
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
            self._staged_ahead = StagedPools(source.layer, source.pools, slots, self.device, self._side)
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

    def _multiply(
        self,
        run: _Layer,
        piece: Piece,
        parts: Sequence[Sequence[int]],
        ends: GroupEnds,
        at: int,
        factors: Factors | None,
    ) -> None:
        """parts: the piece's experts, as many as can be multiplied at once; at: the number of the first part's ends."""
        if piece.copied:
            piece.copied.wait()
        if run.routing.begin(piece.experts[0]) < run.routing.end(piece.experts[-1]):
            for unpack in self._unpackers_of(run.source, piece):
                unpack()
        self.ring.release(piece)
        first = 0
        for number, experts in enumerate(parts):
            here = slice(first, first + len(experts))
            some = factors.part(first, len(experts)) if factors and len(parts) > 1 else factors
            self._multiply_part(run, experts, here, ends.base(at + number), ends.by_slot(at + number), some)
            first = here.stop

    def _multiply_part(
        self,
        run: _Layer,
        experts: Sequence[int],
        here: slice,
        base: torch.Tensor,
        by_slot: torch.Tensor,
        factors: Factors | None,
    ) -> None:
        """here: these experts in the unpacked piece."""
        begin, end = run.routing.begin(experts[0]), run.routing.end(experts[-1])
        if begin == end:
            return
        gate_up, down = self._gate_up[here].flatten(1, 2), self._down[here]
        x_PH, out_PH = run.x_TH.index_select(0, run.routing.token_P[begin:end]), run.out_PH[begin:end]
        if not factors:
            out_PH.copy_(grouped(silu_and_mul(grouped(x_PH, gate_up, base)), down, base))
            return
        low_rank = grouped(grouped(x_PH, factors.gate_up_a, by_slot), factors.gate_up_b, by_slot)
        inner = silu_and_mul(grouped(x_PH, gate_up, base), low_rank)
        low_rank = grouped(grouped(inner, factors.down_a, by_slot), factors.down_b, by_slot)
        torch.add(grouped(inner, down, base), low_rank, out=out_PH)

    def _unpackers_of(self, source: LayerSource, piece: Piece) -> list[Callable[[], None]]:
        """Prepared once for each buffer and number of experts: views cost more than the GPU's work."""
        known = piece.at, len(piece.experts)
        if known not in self._unpackers:
            gate_up, down = self._gate_up[: known[1]], self._down[: known[1]]
            self._unpackers[known] = [
                unpacker
                for shard, packed in zip(source.shards, piece.by_shard, strict=True)
                for unpacker in shard.unpackers(packed, gate_up, down)
            ]
        return self._unpackers[known]


def _cut(experts: Sequence[int], each: int) -> deque[Sequence[int]]:
    return deque(experts[first : first + each] for first in range(0, len(experts), each))
