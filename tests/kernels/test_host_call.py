"""A forward behind a plain pointer, as a CUDA host function calls it: from a thread without Python, again and again."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch
from reference import Batch, Layer, build, random_batch, random_layer, random_lora

import kt_kernels

H, I, E, K, T = 40, 24, 3, 2, 5  # noqa: E741


@pytest.fixture
def layer() -> Layer:
    made = random_layer(E, H, I)
    made.adapters[1] = random_lora(made, 4)
    return made


def held(
    moe: kt_kernels.MoE, batch: Batch, out: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[kt_kernels.HostCall, kt_kernels.HostRecord]:
    record = kt_kernels.HostRecord()
    slots = None if batch.slots is None else batch.slots
    return kt_kernels.HostCall(moe, batch.x, batch.ids, batch.weights, slots, out, rows=rows, record=record), record


def call(held_call: kt_kernels.HostCall) -> None:
    """From a thread of its own; ctypes lets go of the interpreter meanwhile."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(held_call.function)
    thread = threading.Thread(target=function, args=[held_call.argument])
    thread.start()
    thread.join()


def direct(moe: kt_kernels.MoE, batch: Batch, rows: int = T) -> torch.Tensor:
    out = torch.empty(rows, H, dtype=torch.bfloat16)
    slots = None if batch.slots is None else batch.slots[:rows]
    moe.forward(batch.x[:rows], batch.ids[:rows], batch.weights[:rows], slots, out)
    return out


def test_the_last_calls_are_kept_in_their_order(layer: Layer) -> None:
    batch = random_batch(layer, T, K)
    host, record = held(build(layer, "auto"), batch, torch.empty(T, H, dtype=torch.bfloat16))
    assert record.recent() == []
    for _ in range(70):
        call(host)
    starts = [start for start, _, _ in record.recent()]
    assert len(starts) == 64 and starts == sorted(starts) and record.calls == 70


@pytest.mark.parametrize("slots", [None, (-1, 1)])
def test_a_call_gives_what_forward_gives_and_reads_its_buffers_anew(layer: Layer, slots: tuple[int] | None) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K, slots=slots)
    out = torch.full((T, H), 7.0, dtype=torch.bfloat16)
    host, record = held(moe, batch, out)
    call(host)
    assert torch.equal(out, direct(moe, batch))
    batch.x.copy_(torch.randn(T, H))
    batch.ids.copy_(batch.ids.flip(0))
    call(host)
    assert torch.equal(out, direct(moe, batch))
    with_adapter = 0 if batch.slots is None else 2 * int((batch.slots >= 0).sum())
    assert (record.calls, record.tokens, record.adapter_tokens) == (2, 2 * T, with_adapter)
    (start, end, rows), (later, last, _) = record.recent()
    assert rows == T and 0 < start < end < later < last and abs(last - time.time_ns()) < 60 * 10**9
    assert record.experts_read == 2 * len({expert for expert in batch.ids.flatten().tolist() if expert >= 0})
    assert record.busy_ns == end - start + last - later
    assert record.failure is None


@pytest.mark.parametrize(("given", "real"), [(0, 0), (3, 3), (T, T), (2**31 - 1, T), (-4, 0)])
def test_padding_is_not_read_and_comes_out_as_zeros(layer: Layer, given: int, real: int) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K, slots=(-1, 1))
    assert batch.slots is not None
    batch.ids[real:] = 99  # an expert and a slot that are not there
    batch.slots[real:] = 99
    batch.x[real:] = float("nan")
    out = torch.full((T, H), 7.0, dtype=torch.bfloat16)
    host, record = held(moe, batch, out, rows=torch.tensor([given], dtype=torch.int32))
    call(host)
    assert record.failure is None and record.tokens == real
    assert torch.equal(out[:real], direct(moe, batch, real)) and not out[real:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_failure_is_recorded_and_never_looks_like_a_result(layer: Layer, dtype: torch.dtype) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K, slots=(-1, 1))
    assert batch.slots is not None
    out = torch.zeros(T, H, dtype=dtype)
    host, record = held(moe, batch, out)
    batch.slots[4] = 2
    call(host)
    assert out.isnan().all() and record.calls == 0
    first = record.failure
    assert first is not None and "adapter_slots[4]" in first
    batch.slots[4], batch.ids[0, 0] = 1, E
    call(host)
    assert record.failure == first, "the first failure is the cause"
    batch.ids[0, 0] = 0
    call(host)
    assert record.calls == 1 and not out.isnan().any()


def test_an_adapter_swapped_between_two_calls_acts_in_the_second(layer: Layer) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K, slots=(1,))
    out = torch.empty(T, H, dtype=torch.bfloat16)
    host, _ = held(moe, batch, out)
    call(host)
    before = out.clone()
    moe.set_adapter(1, random_lora(layer, 6).packed())
    call(host)
    assert torch.equal(out, direct(moe, batch)) and not torch.equal(out, before)


def test_what_a_call_points_to_lives_as_long_as_the_call(layer: Layer) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K)
    out = torch.empty(T, H, dtype=torch.bfloat16)
    host, record = held(moe, batch, out)
    expected = direct(moe, batch)
    del moe, batch
    call(host)
    assert torch.equal(out, expected) and record.calls == 1


def test_choices_of_real_rows_are_counted_where_somebody_asks(layer: Layer) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K)
    rows = torch.tensor([3], dtype=torch.int32)
    host, record = held(moe, batch, torch.empty(T, H, dtype=torch.bfloat16), rows=rows)
    call(host)
    assert record.expert_counts() == []
    record.count_experts(E)
    batch.ids[0, 0] = -1
    call(host)
    call(host)
    chosen = batch.ids[:3].flatten().tolist()
    assert record.expert_counts() == [2 * chosen.count(expert) for expert in range(E)]


def test_rows_of_another_type_are_refused(layer: Layer) -> None:
    moe, batch = build(layer, "auto"), random_batch(layer, T, K)
    out = torch.empty(T, H, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="rows: expected dtype int32, got int64"):
        held(moe, batch, out, rows=torch.tensor([1]))
    with pytest.raises(ValueError, match="out: shares memory with x"):
        held(moe, batch, batch.x)
