"""The pool: many callers, fork, lifetime, the GIL, and no growth."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from launching import wait_until
from reference import build, forward, random_batch, random_layer

import kt_kernels


def test_many_callers_of_one_pool() -> None:
    layer = random_layer(4, 128, 96)
    experts, hidden, intermediate = layer.sizes
    pool = kt_kernels.ThreadPool(3)
    layers = []
    for _ in range(3):
        moe = kt_kernels.MoE(num_experts=experts, hidden_size=hidden, intermediate_size=intermediate, pool=pool)
        for expert in range(experts):
            moe.load_expert(expert, *layer.matrices(expert))
        layers.append(moe)
    batches = [random_batch(layer, tokens, 2, seed=tokens) for tokens in (1, 17, 50)]
    expected = [forward(layers[0], batch) for batch in batches]
    wrong: list[str] = []

    def run(index: int) -> None:
        for turn in range(60):
            which = (index + turn) % 3
            if not torch.equal(forward(layers[index], batches[which]), expected[which]):
                wrong.append(f"caller {index}, turn {turn}")

    callers = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_threads_and_nodes_in_any_number(threads: int, nodes: int) -> None:
    layer = random_layer(3, 64, 200)
    batch = random_batch(layer, 19, 2)
    out = forward(build(layer, "auto", threads=threads, nodes=nodes), batch)
    one = forward(build(layer, "auto", threads=1, nodes=nodes), batch)
    assert torch.equal(out, one), "the number of threads changes no bit"


def test_a_forked_child_starts_its_own_threads() -> None:
    layer = random_layer(3, 128, 96)
    moe = build(layer, "auto", threads=3)
    batch = random_batch(layer, 9, 2)
    expected = forward(moe, batch)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(forward(moe, batch), expected) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 240
    while (finished := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs in forward")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(finished[1]) == 0
    assert torch.equal(forward(moe, batch), expected), "the parent goes on"


def test_the_gil_is_free_during_a_forward() -> None:
    layer = random_layer(8, 512, 512)
    moe = build(layer, "reference", threads=1)
    batch = random_batch(layer, 64, 4)
    inside = threading.Event()
    seconds: list[float] = []

    def run() -> None:
        inside.set()
        start = time.monotonic()
        forward(moe, batch)
        seconds.append(time.monotonic() - start)

    runner = threading.Thread(target=run)
    runner.start()
    inside.wait()
    turns = 0
    while runner.is_alive():
        turns += 1
    runner.join()
    assert seconds[0] > 0.02, "long enough to tell"
    assert turns > 100, "Python ran meanwhile"


def test_a_pool_outlives_its_python_name() -> None:
    layer = random_layer(2, 64, 64)
    moe = build(layer, "auto", threads=2)  # `build` has let go of the pool
    batch = random_batch(layer, 3, 1)
    assert torch.isfinite(forward(moe, batch)).all()


def threads_now() -> set[str]:
    return {thread.name for thread in Path("/proc/self/task").iterdir()}


def test_threads_end_with_their_pool() -> None:
    layer = random_layer(2, 64, 64)
    batch = random_batch(layer, 3, 1)
    before = threads_now()
    moe = build(layer, "auto", threads=4)
    forward(moe, batch)
    own = threads_now() - before
    assert len(own) == 3
    del moe
    wait_until(lambda: not own & threads_now())  # a joined thread may be listed for a moment


def test_an_unused_pool_has_no_threads() -> None:
    before = threads_now()
    pool = kt_kernels.ThreadPool(8)
    assert threads_now() <= before
    assert pool.threads == 8


def test_idle_threads_sleep() -> None:
    layer = random_layer(2, 64, 64)
    moe = build(layer, "auto", threads=3)
    forward(moe, random_batch(layer, 3, 1))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1, "nothing spins between forwards"


def test_memory_does_not_grow() -> None:
    """80 bytes a forward would be 1.6 MB each time; a step of the allocator or a huge page of the kernel comes once."""
    layer = random_layer(4, 64, 64)
    moe = build(layer, "auto")
    batch = random_batch(layer, 2, 2)
    out = torch.empty(2, 64)

    def rounds(count: int) -> None:
        for _ in range(count):
            moe.forward(batch.x, batch.ids, batch.weights, None, out)

    rounds(2000)
    grown: list[int] = []
    while not grown or (grown[-1] >= 800 and len(grown) < 4):
        first = resident_kib()
        rounds(20000)
        grown.append(resident_kib() - first)
    assert grown[-1] < 800, grown


def resident_kib() -> int:
    """As the kernel counts it page by page; statm is some pages a core behind."""
    (line,) = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Rss:")]
    return int(line.split()[1])


def awake_s(awake_us: int) -> float:
    """How long a pool's second thread wants to run after a forward, whether or not a busy machine lets it."""
    layer = random_layer(2, 64, 32)
    experts, hidden, intermediate = layer.sizes
    batch, known = random_batch(layer, 9, 2), {*Path("/proc/self/task").iterdir()}
    pool = kt_kernels.ThreadPool(2)
    moe = kt_kernels.MoE(num_experts=experts, hidden_size=hidden, intermediate_size=intermediate, pool=pool)
    for expert in range(experts):
        moe.load_expert(expert, *layer.matrices(expert))
    pool.stay_awake(awake_us)
    forward(moe, batch)
    began = time.monotonic()
    (thread,) = {*Path("/proc/self/task").iterdir()} - known
    while (state := (thread / "stat").read_text().rpartition(")")[2].split()[0]) == "R":
        assert time.monotonic() - began < 30, state
        time.sleep(0.002)
    return time.monotonic() - began


def test_threads_stay_awake_only_when_asked_and_not_for_longer() -> None:
    asleep, awake = [awake_s(0) for _ in range(5)], [awake_s(200_000) for _ in range(5)]
    assert min(asleep) < 0.05 < 0.15 < max(awake) and min(awake) < 0.4, (asleep, awake)
    with pytest.raises(ValueError, match="us: expected 0 to 1000000, got -1"):
        kt_kernels.ThreadPool(2).stay_awake(-1)
