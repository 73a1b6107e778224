"""The mailbox without a GPU: a stand-in for the stream does what mailbox.cu says, from a thread of its own."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_kernels

T, K, E, H, I = 4, 2, 4, 64, 48  # noqa: E741
NAN = b"\xc0\x7f"


def hand_over(batch: Any, request: ctypes.c_void_p, number: ctypes.c_int) -> None:
    for part in batch.parts:
        if part.bytes:
            ctypes.memmove(part.to, part.from_, part.bytes)
    ctypes.c_int.from_address(request.value or 0).value = number.value


def take_back(out: Any, answer: ctypes.c_void_p, number: ctypes.c_int) -> None:
    word, closed = (ctypes.c_int.from_address((answer.value or 0) + at) for at in (0, 4))
    end = time.monotonic() + 240
    while word.value != number.value and not closed.value:
        assert time.monotonic() < end
        time.sleep(1e-4)
    if word.value == number.value:
        word.value = 0
        ctypes.memmove(out.to, out.from_, out.bytes)
    else:
        ctypes.memmove(out.to, NAN * (out.bytes // 2), out.bytes)


KERNELS: dict[str, Callable[..., None]] = {"kt_hand_over": hand_over, "kt_take_back": take_back}


class Stream:
    """Runs the kernels that it captured in their order, again and again, from copies of their arguments."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] = []

    def launch(self, name: str, *arguments: Any) -> None:
        own = [type(argument).from_buffer_copy(argument) for argument in arguments]
        self.captured.append(partial(KERNELS[name], *own))

    def replay(self) -> None:
        thread = threading.Thread(target=lambda: [each() for each in self.captured])
        thread.start()
        thread.join()


class Steps:
    """One layer after another, each reading what the one before gave."""

    def __init__(self, layers: int = 2) -> None:
        from kt_sglang.decode.captured import CapturedSteps
        from kt_sglang.decode.handover import Mailbox

        self.stream = Stream()
        self.way = Mailbox(self.stream.launch, pinned=False)
        self.steps = CapturedSteps(self.way, pinned=False)
        self.steps.prepare(T, K, H)
        self.moes = [layer(seed) for seed in range(layers)]
        self.records = [kt_kernels.HostRecord() for _ in self.moes]
        self.x, self.weights = torch.randn(T, H).bfloat16(), torch.rand(T, K)
        self.ids, self.slots = torch.randint(0, E, (T, K), dtype=torch.int32), torch.full((T,), -1, dtype=torch.int32)
        self.outs = [self.x]
        for moe, record in zip(self.moes, self.records, strict=True):
            self.outs.append(self.steps.run(moe, record, self.outs[-1], self.ids, self.weights, self.slots))

    def expected(self, rows: int = T) -> torch.Tensor:
        x = self.x
        for moe in self.moes:
            out = torch.zeros(T, H, dtype=torch.bfloat16)
            moe.forward(x[:rows], self.ids[:rows], self.weights[:rows], None, out[:rows])
            x = out
        return x


def layer(seed: int) -> kt_kernels.MoE:
    generator = torch.Generator().manual_seed(seed)
    moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, pool=kt_kernels.ThreadPool(1))
    for expert in range(E):
        parts = (torch.randn(shape, generator=generator).bfloat16() / 8 for shape in ((I, H), (I, H), (H, I)))
        moe.load_expert(expert, *parts)
    return moe


def test_replays_read_the_batch_anew_and_leave_padding_out() -> None:
    from kt_sglang.decode.captured import ALL_ROWS

    made = Steps()
    for rows, given in ((T, ALL_ROWS), (3, 3), (0, 0), (T, T)):
        made.x.normal_()
        made.ids.random_(0, E)
        made.weights.uniform_()
        made.steps.set_real_rows(given, "cpu")
        made.stream.replay()
        assert torch.equal(made.outs[-1], made.expected(rows))
    assert [(record.calls, record.tokens) for record in made.records] == [(4, 2 * T + 3)] * 2


def test_a_failed_call_is_told_with_its_layer_and_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_sglang.decode import captured
    from kt_sglang.moe import layers

    monkeypatch.setattr(layers.LAYERS, "records", {})
    made, record = Steps(), layers.LayerRecord(5)
    record.host = made.records[1]
    captured.raise_failure()
    made.slots[1] = 3
    made.stream.replay()
    assert made.outs[-1].isnan().all()
    with pytest.raises(RuntimeError, match=r"layer 5: kt_kernels failed in a replayed step: adapter_slots\[1\]"):
        captured.raise_failure()


def test_where_the_thread_has_ended_a_replay_ends_with_nan_and_a_cause() -> None:
    made = Steps()
    made.way.words[kt_kernels.Mailbox.REQUEST] = 42
    while not made.way.words[kt_kernels.Mailbox.CLOSED]:
        time.sleep(1e-3)
    made.stream.replay()
    assert made.outs[-1].isnan().all()
    assert all("call 42 was asked for" in str(record.failure) for record in made.records)


def test_the_kernels_as_they_are_shipped_have_the_names_and_parameters_that_are_called() -> None:
    from kt_sglang.decode import handover
    from kt_sglang.decode.handover import Batch, Copy

    folder = Path(handover.__file__).parent
    text, source = (folder / "mailbox.ptx").read_text(), (folder / "mailbox.cu").read_bytes()
    assert text.startswith(f"// mailbox.cu {hashlib.sha256(source).hexdigest()}\n"), "compile mailbox.cu again"
    assert ".target sm_70" in text
    for line in (
        f".param .align 8 .b8 kt_hand_over_param_0[{ctypes.sizeof(Batch)}],",
        f".param .align 8 .b8 kt_take_back_param_0[{ctypes.sizeof(Copy)}],",
        ".visible .entry kt_hand_over(",
        ".visible .entry kt_take_back(",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("asked", "limited", "refusal", "why"),
    [
        ("", False, None, None),
        ("host_function", False, None, "kt.handover asks for it"),
        ("", True, None, "the device also drives a display"),
        ("", False, RuntimeError("CUDA refused mailbox.ptx (the driver's error 222)"), "error 222"),
    ],
)
def test_where_no_kernel_can_wait_the_driver_calls(
    asked: str,
    limited: bool,
    refusal: Exception | None,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from kt_model.contract import HANDOVER
    from kt_sglang.decode import handover

    def kernels() -> dict[str, Any]:
        if refusal:
            raise refusal
        return {}

    monkeypatch.setenv(HANDOVER, asked)
    monkeypatch.setattr(handover, "_kernel_time_is_limited", lambda: limited)
    monkeypatch.setattr(handover, "_kernels", kernels)
    monkeypatch.setattr(handover, "Mailbox", lambda launch: "mailbox")
    caplog.set_level("INFO")
    way: Any = handover.on_cuda()
    assert way == "mailbox" if why is None else isinstance(way, handover.HostFunctions)
    assert (why or "") in caplog.text and bool(why) == bool(caplog.text)
