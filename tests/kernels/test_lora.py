"""Adapters: ranks, mixtures, absent ones, and swaps while forwards run."""

from __future__ import annotations

import threading

import pytest
import torch
from reference import Batch, LoRA, build, check, forward, random_batch, random_layer, random_lora, relative_l2

RANKS = [0, 1, 8, 16, 17, 64]


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(isa: str, method: str, rank: int) -> None:
    layer = random_layer(3, 136, 100)
    layer.adapters[0] = random_lora(layer, rank, scale=2.0)
    moe = build(layer, isa, method)
    for tokens in (1, 3, 18):
        with_adapter = random_batch(layer, tokens, 2, slots=(0,))
        out = check(layer, moe, with_adapter, f"rank {rank}, {tokens} tokens")
        base = forward(moe, Batch(with_adapter.x, with_adapter.ids, with_adapter.weights))
        if rank == 0:
            assert relative_l2(out, base) < 1e-6
        else:
            assert relative_l2(out, base) > 0.3, "the delta is far above zero"


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_adapters_over_pools(isa: str, method: str, nodes: int) -> None:
    """Slices of B (gate, up) and A (down) must be cut as the base is."""
    layer = random_layer(2, 72, 330)
    layer.adapters[0] = random_lora(layer, (3, 8, 20))
    check(layer, build(layer, isa, method, nodes=nodes), random_batch(layer, 7, 2, slots=(-1, 0)), f"{nodes} pools")


def test_ranks_differ_a_projection(isa: str) -> None:
    layer = random_layer(2, 96, 80)
    layer.adapters[0] = random_lora(layer, (4, 0, 33), scale=0.5)
    layer.adapters[1] = random_lora(layer, (0, 19, 2), scale=4.0, seed=9)
    check(layer, build(layer, isa), random_batch(layer, 11, 2, slots=(0, 1)))


@pytest.mark.parametrize("absent", ["gate", "up", "down"])
def test_absent_projections(isa: str, absent: str) -> None:
    layer = random_layer(2, 64, 48)
    full = random_lora(layer, 8)
    sides = {"gate": full.gate, "up": full.up, "down": full.down, absent: None}
    layer.adapters[0] = LoRA(**sides, scale=1.5)
    check(layer, build(layer, isa), random_batch(layer, 6, 2, slots=(0,)))


def test_only_down(isa: str) -> None:
    layer = random_layer(2, 64, 48)
    layer.adapters[0] = LoRA(None, None, random_lora(layer, 8).down)
    check(layer, build(layer, isa), random_batch(layer, 6, 2, slots=(0, -1)))


def test_float32_adapters(isa: str) -> None:
    layer = random_layer(2, 64, 48)
    layer.adapters[0] = random_lora(layer, 8, dtype=torch.float32)
    rounded = random_layer(2, 64, 48)
    rounded.adapters[0] = layer.adapters[0].rounded()
    batch = random_batch(layer, 6, 2, slots=(0,))
    assert torch.equal(forward(build(layer, isa), batch), check(rounded, build(rounded, isa), batch))


def test_two_adapters_and_base_in_one_batch(isa: str, method: str) -> None:
    layer = random_layer(4, 136, 100)
    layer.adapters[0] = random_lora(layer, 8, scale=2.0)
    layer.adapters[3] = random_lora(layer, 17, scale=0.25, seed=5)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 40, 2, slots=(-1, 0, 3))
    mixed = check(layer, moe, batch)
    assert batch.slots is not None
    for slot in (-1, 0, 3):  # each token as if its adapter were the only one
        mine = batch.slots == slot
        alone = forward(moe, Batch(batch.x[mine], batch.ids[mine], batch.weights[mine], batch.slots[mine]))
        assert relative_l2(mixed[mine], alone) < 1e-5


def test_eight_adapters_of_many_ranks(isa: str) -> None:
    layer = random_layer(3, 72, 88)
    for slot, rank in enumerate((1, 2, 4, 8, 16, 17, 32, 64)):
        layer.adapters[slot] = random_lora(layer, rank, scale=0.5 + slot, seed=slot)
    check(layer, build(layer, isa), random_batch(layer, 50, 2, slots=(-1, *range(8))))


def test_the_base_is_the_true_base(isa: str, method: str) -> None:
    """Filled slots change nothing for rows without an adapter, to the bit."""
    layer = random_layer(3, 72, 88)
    batch = random_batch(layer, 10, 2)
    plain = forward(build(layer, isa, method), batch)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, isa, method)
    assert torch.equal(forward(moe, batch), plain)
    none = Batch(batch.x, batch.ids, batch.weights, torch.full((10,), -1, dtype=torch.int32))
    assert torch.equal(forward(moe, none), plain)


def test_an_updated_slot_is_seen_at_once(isa: str) -> None:
    """A 'prepared' flag that outlives an update would serve the old adapter."""
    layer = random_layer(2, 64, 48)
    layer.adapters[0] = random_lora(layer, 8, seed=1)
    moe = build(layer, isa)
    batch = random_batch(layer, 4, 2, slots=(0,))
    first = check(layer, moe, batch)
    layer.adapters[0] = random_lora(layer, 16, seed=2)
    moe.set_adapter(0, layer.adapters[0].packed())
    assert relative_l2(check(layer, moe, batch), first) > 0.3


def test_the_packed_adapter_is_a_copy() -> None:
    layer = random_layer(2, 64, 48)
    lora = random_lora(layer, 8)
    layer.adapters[0] = lora
    moe = build(layer, "auto")
    batch = random_batch(layer, 4, 2, slots=(0,))
    before = forward(moe, batch)
    for tensor in lora.tensors:
        tensor.zero_()
    assert torch.equal(forward(moe, batch), before)


def test_a_freed_adapter_is_refused_by_slot() -> None:
    layer = random_layer(2, 64, 48)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, "auto")
    batch = random_batch(layer, 4, 2, slots=(0,))
    forward(moe, batch)
    moe.set_adapter(0, None)
    with pytest.raises(ValueError, match=r"adapter_slots\[0\]: no adapter in slot 0"):
        forward(moe, batch)


def test_swap_while_forwards_run() -> None:
    """Each result is that of one adapter or of the other, never of a mixture, and nothing crashes."""
    layer = random_layer(4, 256, 192)
    packed = [random_lora(layer, 16, seed=seed).packed() for seed in (1, 2)]
    moe = build(layer, "auto")
    batch = random_batch(layer, 8, 2, slots=(0,))
    expected = []
    for adapter in packed:
        moe.set_adapter(0, adapter)
        expected.append(forward(moe, batch))
    stop = threading.Event()
    wrong: list[int] = []

    def run() -> None:
        while not stop.is_set():
            out = forward(moe, batch)
            if not any(torch.equal(out, one) for one in expected):
                wrong.append(1)

    runners = [threading.Thread(target=run) for _ in range(3)]
    for runner in runners:
        runner.start()
    for turn in range(400):
        fresh = random_lora(layer, 16, seed=1 + turn % 2).packed() if turn % 50 == 0 else packed[turn % 2]
        moe.set_adapter(0, fresh)
    stop.set()
    for runner in runners:
        runner.join()
    assert not wrong
