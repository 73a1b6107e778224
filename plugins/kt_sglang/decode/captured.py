"""A decode step that a CUDA graph replays. The batch goes to the CPU through pinned buffers with fixed addresses,
kt_kernels runs on a thread without Python, and the result returns on the stream: a replay contains no Python, no
allocation and no synchronization. Layers run one after another on their stream, so all of them share one set of
buffers.

Not here: how the batch gets there and back (handover.py), batches that no graph captures (transfer.py), which adapter
is in which slot (lora.py).

Shapes: T rows of the graph, the last of them padding; K top-k; H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

import kt_kernels
from kt_sglang.decode.handover import DeviceBatch, Handover, HostBuffers, on_cuda
from kt_sglang.moe import recording
from kt_sglang.moe.layers import LAYERS

ALL_ROWS = 2**31 - 1
"""Means that no row is padding."""
POLL_S = 50e-6
BETWEEN_LAYERS_US = 500
"""More than attention, router and copies take on a GPU between two layers' experts: sleeping and waking up would cost a
step more than that."""


class SideStream:
    """A second stream of the device, for the CPU's part while the first stream continues."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Work launched inside waits for what is on the current stream so far, but not for what follows."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream continues once the other has finished."""
        torch.cuda.current_stream().wait_stream(self._stream)


class CapturedSteps:
    """State shared by the graphs of one process."""

    def __init__(self, handover: Handover, *, pinned: bool = True, side: Callable[[], Any] = SideStream) -> None:
        self._handover = handover
        self._make_side = side
        self._side: Any = None
        self._pinned = pinned
        self._buffers: dict[tuple[int, int, int], HostBuffers] = {}
        self._calls: list[kt_kernels.HostCall] = []  # graphs point to them
        self._rows = torch.full((1,), ALL_ROWS, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._counts: torch.Tensor | None = None

    def prepare(self, tokens: int, top_k: int, hidden: int) -> None:
        """Allocate what a capture of this size needs: pinning memory is forbidden during a capture."""
        key = (tokens, top_k, hidden)
        if key not in self._buffers:
            self._buffers[key] = HostBuffers.allocate(tokens, top_k, hidden, self._pinned)

    def prepare_side(self) -> None:
        """Create the second stream, which some layers need."""
        if self._side is None:
            self._side = self._make_side()

    def run_beside(
        self, cpu_experts: Callable[[], torch.Tensor], meanwhile: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The sum of both: `cpu_experts` runs on the second stream, `meanwhile` on the current one."""
        with self._side.forked():
            from_cpu = cpu_experts()
        from_device = meanwhile()
        self._side.join()
        return from_cpu + from_device

    def run(
        self,
        moe: kt_kernels.MoE,
        record: kt_kernels.HostRecord,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_T: torch.Tensor | None,
        numbers: Sequence[int] = (),
    ) -> torch.Tensor:
        """Σ_k weight·expert(x) of one layer, put on the current stream; in the dtype and on the device of x. `numbers`:
        each expert's number in the layer, -1 where it is elsewhere; empty where ids are those numbers."""
        host = self._buffers[(x_TH.shape[0], ids_TK.shape[1], x_TH.shape[1])]
        slots = None if slots_T is None else host.slots_T
        call = kt_kernels.HostCall(
            moe,
            host.x_TH,
            host.ids_TK,
            host.weights_TK,
            slots,
            host.out_TH,
            rows=self._rows,
            numbers=numbers,
            record=record,
        )
        self._calls.append(call)
        return self._handover.compute(call, DeviceBatch(x_TH, ids_TK, weights_TK, slots_T), host)

    def set_real_rows(self, count: int, device: torch.device | str) -> None:
        """Announces a replay on the current stream with so many real rows; ALL_ROWS: none is padding."""
        if not self._calls:
            return
        self._handover.announce()
        if self._counts is None:
            most = max(tokens for tokens, _, _ in self._buffers)
            self._counts = torch.tensor([*range(most + 1), ALL_ROWS], dtype=torch.int32, device=device)
        last = len(self._counts) - 1
        at = count if count < last else last
        self._rows.copy_(self._counts[at : at + 1], non_blocking=True)


@cache
def steps() -> CapturedSteps:
    """The instance of this process."""
    return CapturedSteps(on_cuda())


def is_capturing(x_TH: torch.Tensor) -> bool:
    """Whether work launched now is captured into a graph."""
    return bool(x_TH.is_cuda and torch.cuda.is_current_stream_capturing())


def is_warming_up(x_TH: torch.Tensor) -> bool:
    """Whether this is one of the warm-up forwards that SGLang runs before a capture, whose results are discarded."""
    if not x_TH.is_cuda:
        return False
    from sglang.srt.model_executor.runner_utils import capture_mode

    return bool(capture_mode.is_capture_mode and not torch.cuda.is_current_stream_capturing())


def raise_failure() -> None:
    """Raise RuntimeError with layer and cause if a call in a replay failed: its rows were NaN."""
    for layer, record in LAYERS.records.items():
        if record.host.failure is not None:
            raise RuntimeError(f"layer {layer}: kt_kernels failed in a replayed step: {record.host.failure}")


def around_execute(original: Callable[..., Any], runner: Any, forward_batch: Any, *rest: Any, **options: Any) -> Any:
    """AROUND hook of `DecodeCudaGraphRunner.execute`: the graph's rows beyond the batch are padding.

    SGLang masks their experts only under expert or data parallelism. Whatever else is replayed has no padding for us:
    batches gathered from several ranks, and speculation.
    """
    raise_failure()
    simple = not runner.require_gathered_buffer and forward_batch.spec_info is None
    real = forward_batch.batch_size * runner.captured_req_width if simple else ALL_ROWS
    steps().set_real_rows(real, runner.device)
    try:
        return original(runner, forward_batch, *rest, **options)
    finally:
        steps().set_real_rows(ALL_ROWS, runner.device)


def before_process_batch_result_decode(processor: Any, batch: Any, result: Any) -> None:
    """BEFORE hook of `SchedulerBatchResultProcessor.process_batch_result_decode`: no token of a failed step is sent.

    The step is waited for here instead of in SGLang, which would spin on a core that computes experts. Not an AROUND
    hook, as nan_guard has one on the same function, and of two of them SGLang warns.
    """
    wait_for(result.copy_done)
    raise_failure()
    recording.step_ran()


def before_process_batch_result_prefill(processor: Any, batch: Any, result: Any, *rest: Any, **options: Any) -> None:
    """BEFORE hook of `SchedulerBatchResultProcessor.process_batch_result_prefill`: its wait, too, leaves the core to
    threads that compute experts, here those of another process (kt.tp_experts=rank0), for as long as they take."""
    if result.copy_done is not None:
        wait_for(result.copy_done)


def wait_for(event: Any) -> None:
    """Wait without using a core, unlike CUDA's own wait; None: for everything on the current stream."""
    if event is None:
        event = torch.cuda.current_stream().record_event()
    if isinstance(event, torch.cuda.Event):
        while not event.query():
            time.sleep(POLL_S)
    else:
        event.synchronize()
