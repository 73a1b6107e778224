"""Calls that a word of memory asks for: what a GPU's kernels do is done here by this thread."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference import Batch, Layer, build, random_batch, random_layer

import kt_kernels
from kt_kernels import Mailbox

H, I, E, K, T = 40, 24, 3, 2, 5  # noqa: E741


@pytest.fixture
def layer() -> Layer:
    return random_layer(E, H, I)


class Device:
    """Memory of a mailbox, and how a device uses it."""

    def __init__(self) -> None:
        self.words = torch.full((Mailbox.WORDS,), 9, dtype=torch.int32)
        self.box = Mailbox(self.words)

    def ask(self, number: int, limit_s: float = 20.0) -> bool:
        """Whether the call was answered; False: none will be."""
        self.words[Mailbox.REQUEST] = number
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if self.words[Mailbox.ANSWER] == number:
                self.words[Mailbox.ANSWER] = 0
                return True
            if self.words[Mailbox.CLOSED]:
                return False
            time.sleep(1e-4)
        raise TimeoutError(number)


def held(moe: kt_kernels.MoE, batch: Batch) -> tuple[kt_kernels.HostCall, torch.Tensor, kt_kernels.HostRecord]:
    out, record = torch.zeros(T, H, dtype=torch.bfloat16), kt_kernels.HostRecord()
    return kt_kernels.HostCall(moe, batch.x, batch.ids, batch.weights, None, out, record=record), out, record


def direct(moe: kt_kernels.MoE, batch: Batch) -> torch.Tensor:
    out = torch.empty(T, H, dtype=torch.bfloat16)
    moe.forward(batch.x, batch.ids, batch.weights, None, out)
    return out


def test_calls_are_answered_in_any_order_and_read_their_buffers_anew(layer: Layer) -> None:
    device, moe = Device(), build(layer, "auto")
    assert [int(device.words[at]) for at in (Mailbox.REQUEST, Mailbox.ANSWER, Mailbox.CLOSED)] == [0, 0, 0]
    batches = [random_batch(layer, T, K) for _ in range(3)]
    calls = [held(moe, batch) for batch in batches]
    numbers = [device.box.add(call) for call, _, _ in calls]
    assert numbers == [1, 2, 3]
    for at in (0, 1, 2, 2, 0, 1):
        batches[at].x.copy_(torch.randn(T, H))
        assert device.ask(numbers[at])
        assert torch.equal(calls[at][1], direct(moe, batches[at]))
    assert [record.calls for _, _, record in calls] == [2, 2, 2]


def test_what_a_call_needs_lives_as_long_as_the_mailbox(layer: Layer) -> None:
    device, moe, batch = Device(), build(layer, "auto"), random_batch(layer, T, K)
    expected = direct(moe, batch)
    call, out, _ = held(moe, batch)
    number = device.box.add(call)
    del call, moe, batch
    gc.collect()
    assert device.ask(number) and torch.equal(out, expected)


def test_a_failed_call_is_answered_with_nan_and_others_follow(layer: Layer) -> None:
    device, moe, batch = Device(), build(layer, "auto"), random_batch(layer, T, K)
    call, out, record = held(moe, batch)
    number = device.box.add(call)
    batch.ids[0, 0] = E
    assert device.ask(number) and out.isnan().all() and "topk_ids" in str(record.failure)
    batch.ids[0, 0] = 0
    assert device.ask(number) and not out.isnan().any()


def test_a_thread_that_cannot_go_on_tells_the_device_and_every_record(layer: Layer) -> None:
    device, moe = Device(), build(layer, "auto")
    calls = [held(moe, random_batch(layer, T, K)) for _ in range(2)]
    for call, _, _ in calls:
        device.box.add(call)
    assert not device.ask(7)
    expected = "mailbox: call 7 was asked for, expected 1 to 2"
    assert [record.failure for _, _, record in calls] == [expected, expected]
    assert not device.ask(1), "nobody waits for it any more"


def test_a_mailbox_that_goes_tells_the_device(layer: Layer) -> None:
    device = Device()
    words = device.words
    del device
    gc.collect()
    assert words[Mailbox.CLOSED] == 1


def test_after_a_long_pause_an_announced_request_is_answered(layer: Layer) -> None:
    """It uses next to no time of a core, soon after a request and two seconds later, when it sleeps."""
    device, moe, batch = Device(), build(layer, "auto"), random_batch(layer, T, K)
    call, out, _ = held(moe, batch)
    number = device.box.add(call)
    assert device.ask(number)
    for pause_s in (0.1, 2.2):
        time.sleep(pause_s)
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.1
    assert device.ask(number), "and one that nobody announced"
    time.sleep(2.3)
    device.box.announce()
    assert device.ask(number) and torch.equal(out, direct(moe, batch))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (torch.zeros(3, dtype=torch.int32), "words: expected shape"),
        (torch.zeros(Mailbox.WORDS), "expected dtype int32"),
    ],
)
def test_other_words_are_refused(words: torch.Tensor, expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=expected):
        Mailbox(words)


SCRIPT = """
import os, torch, kt_kernels
words = torch.zeros(kt_kernels.Mailbox.WORDS, dtype=torch.int32)
box = kt_kernels.Mailbox(words)
child = os.fork()
if child == 0:
    del box
    os._exit(0 if int(words[kt_kernels.Mailbox.CLOSED]) == 0 else 3)
print(os.waitpid(child, 0)[1], int(words[kt_kernels.Mailbox.CLOSED]))
"""


def test_a_forked_child_leaves_the_thread_to_its_parent(tmp_path: Path) -> None:
    own = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(own, capture_output=True, text=True, timeout=300, env=dict(os.environ), cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0"]), done.stderr
