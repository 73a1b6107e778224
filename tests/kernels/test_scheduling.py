"""What the system does to threads: fewer CPUs, stops anywhere, neighbours that compute, forks. Results stay the same.

A cgroup's quota stops the threads of a group wherever they are, for tens of milliseconds; SIGSTOP does the same to a
process without needing the right to make a group, and one CPU for all threads stops them one at a time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import Batch, build, forward, random_batch, random_layer, random_lora

import kt_kernels

HERE = Path(__file__).resolve().parent
WHEEL = Path(kt_kernels.__file__).resolve().parent.parent
START = f"""
import os, sys, time
sys.path[:0] = [{str(HERE)!r}, {str(WHEEL)!r}]
import torch
from reference import build, forward, random_batch, random_layer, random_lora
layer = random_layer(4, 256, 192)
layer.adapters[0] = random_lora(layer, 8)
batches = [random_batch(layer, tokens, 2, slots=(-1, 0), seed=tokens) for tokens in (1, 9, 40)]
expected = [forward(build(layer, "auto", threads=1), batch) for batch in batches]

def same(moe):
    return all(torch.equal(forward(moe, batch), before) for batch, before in zip(batches, expected))
"""


def run_alone(code: str) -> str:
    """In a process of its own, whose affinity may be changed."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("nodes", [1, 3])
def test_threads_stay_on_the_cpus_that_are_allowed(nodes: int) -> None:
    """As `taskset`, a container's cpuset or Slurm gives them."""
    run_alone(f"""
one = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {{one}})
before = set(os.listdir("/proc/self/task"))  # this one and torch's own, which were free to go anywhere
moe = build(layer, "auto", threads=4, nodes={nodes})
expected = [forward(build(layer, "auto", threads=1, nodes={nodes}), batch) for batch in batches]
assert all(same(moe) for _ in range(20)), "more threads than CPUs change a result"
threads = [int(name) for name in set(os.listdir("/proc/self/task")) - before]
assert len(threads) == 3, threads
assert all(os.sched_getaffinity(thread) == {{one}} for thread in threads), "a thread left the allowed CPUs"
""")


def test_cpus_that_are_taken_away_while_serving() -> None:
    """A cpuset that shrinks moves all threads at once, and gives them back later."""
    run_alone("""
everywhere = os.sched_getaffinity(0)
moe = build(layer, "auto", threads=3)
assert same(moe)
for turn in range(20):
    cpus = {min(everywhere)} if turn % 2 == 0 else everywhere
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
    assert same(moe), f"turn {turn}"
""")


def test_stops_in_the_middle_change_nothing() -> None:
    """A quota that is used up: everything stands still at any instruction and goes on later."""
    code = (
        START
        + """
moe = build(layer, "auto", threads=3)
print("ready", flush=True)
end = time.monotonic() + 2.0
rounds = 0
while time.monotonic() < end:
    assert same(moe), f"round {rounds}"
    rounds += 1
print(rounds)
"""
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    stops = 0
    while child.poll() is None and stops < 1000:
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.004)
        child.send_signal(signal.SIGCONT)
        time.sleep(0.004 + stops % 7 * 0.0007)
        stops += 1
    out, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert int(out) > 3 and stops > 50, f"{out} rounds, {stops} stops"


@contextlib.contextmanager
def competing(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute without end; they stand still until they are continued."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        for process in busy:
            process.send_signal(signal.SIGSTOP)
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_competing_process_costs_its_share_and_not_more() -> None:
    """Threads that spin for a peer that is not running take the CPU that the peer needs: others lose 7 to 25 times.

    Quiet and busy rounds take turns, so that whatever else runs here is in both; the bound is wide for the same reason.
    """
    threads = min(len(os.sched_getaffinity(0)), 4)
    layer = random_layer(8, 512, 512)
    moe = build(layer, "auto", threads=threads)
    batch = random_batch(layer, 1, 8)
    quiet, loud = [], []
    with competing(1) as busy:
        for _ in range(6):
            quiet.append(milliseconds(moe, batch))
            for process in busy:
                process.send_signal(signal.SIGCONT)
            loud.append(milliseconds(moe, batch))
            for process in busy:
                process.send_signal(signal.SIGSTOP)
    ratio = statistics.median(loud) / statistics.median(quiet)
    assert ratio < 10, f"{ratio:.1f} times as long beside one busy process on {threads} threads"


def milliseconds(moe: kt_kernels.MoE, batch: Batch) -> float:
    """Of one forward among a hundred, waiting included."""
    out = torch.empty(batch.x.shape, dtype=torch.float32)
    start = time.perf_counter()
    for _ in range(100):
        moe.forward(batch.x, batch.ids, batch.weights, None, out)
    return (time.perf_counter() - start) * 10


def wait_for(child: int) -> int:
    deadline = time.monotonic() + 240
    while (finished := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(finished[1])


@pytest.mark.parametrize("isa", ["reference", "auto"])
def test_forks_while_other_threads_serve_and_swap(isa: str) -> None:
    """The child has none of the parent's threads, and a pool and locks that were busy when they were copied."""
    layer = random_layer(4, 256, 256)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, isa, threads=2)
    batch = random_batch(layer, 8, 4, slots=(-1, 0))
    expected = forward(moe, batch)
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            forward(moe, batch)

    def swap() -> None:
        same = layer.adapters[0].packed()
        while not over.is_set():
            moe.set_adapter(0, same)

    others = [threading.Thread(target=work) for work in (serve, swap)]
    for other in others:
        other.start()
    codes = []
    for _ in range(6):
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if torch.equal(forward(moe, batch), expected) else 2
            finally:
                os._exit(code)
        codes.append(wait_for(child))
    over.set()
    for other in others:
        other.join()
    assert codes == [0] * 6
    assert torch.equal(forward(moe, batch), expected), "the parent goes on"


def test_a_forked_child_has_adapters_of_its_own() -> None:
    """A swap in the child is not seen by the parent; a grandchild has the child's."""
    layer = random_layer(3, 128, 96)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, "auto", threads=2)
    batch = random_batch(layer, 9, 2, slots=(0,))
    mine = forward(moe, batch)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            moe.set_adapter(0, random_lora(layer, 8, seed=5).packed())
            swapped = forward(moe, batch)
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if torch.equal(forward(moe, batch), swapped) else 3)
            code = wait_for(grandchild) or (2 if torch.equal(swapped, mine) else 0)
        finally:
            os._exit(code)
    assert wait_for(child) == 0
    assert torch.equal(forward(moe, batch), mine)


def test_a_child_that_ends_leaves_the_parents_threads() -> None:
    """Its copy of the pool is let go with Python's end, and must not wait for threads that it never had."""
    layer = random_layer(2, 64, 48)
    moe = build(layer, "auto", threads=3)
    batch = random_batch(layer, 4, 2)
    expected = forward(moe, batch)
    child = os.fork()
    if child == 0:
        del moe  # the destructors run
        os._exit(0)
    assert wait_for(child) == 0
    assert torch.equal(forward(moe, batch), expected)
