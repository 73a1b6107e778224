"""Every number of rows with every rank, on every method, instruction set, pool count and tail: each pair on its own.

One layer has an expert for each number of rows, so that one batch holds them all; in each turn every expert meets
another rank, and after all turns each has met each. The rows of one pair are compared with their own rounding: the
worst value, and the spread of them all, so that neither a single wrong value nor a small error in all of them can hide.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from reference import (
    Batch,
    Layer,
    Truth,
    Weights,
    assert_close,
    build,
    dequantized,
    forward,
    random_layer,
    random_lora,
    truth_of,
)
from rounding import Rules

ROWS = [*range(1, 18), 31, 64, 100]
RANKS = [0, 1, 8, 16, 17, 64]
SLOTS = range(-1, len(RANKS))  # -1: no adapter
TAILS = [(1, 1), (15, 17), (33, 31), (64, 64), (65, 63), (130, 200), (257, 321), (96, 1100), (1100, 96)]


@cache
def layer_of(shape: tuple[int, int]) -> Layer:
    layer = random_layer(len(ROWS), *shape)
    for slot, rank in enumerate(RANKS):
        layer.adapters[slot] = random_lora(layer, rank, scale=0.5 + slot, seed=slot)
    return layer


@cache
def batches_of(hidden: int) -> list[Batch]:
    """One a turn; the last one mixes the slots inside each expert. Tokens come in no order."""
    generator = torch.Generator().manual_seed(hidden)
    expert = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS))
    expert = expert[torch.randperm(len(expert), generator=generator)]
    x = torch.randn(len(expert), hidden, generator=generator).bfloat16()
    weights = torch.rand(len(expert), 1, generator=generator) + 0.1
    slots = [(expert + turn) % len(SLOTS) - 1 for turn in SLOTS]
    slots.append(torch.randint(-1, len(RANKS), expert.shape, generator=generator))
    return [Batch(x, expert[:, None], weights, of_turn) for of_turn in slots]


@cache
def weights_of(shape: tuple[int, int], method: str) -> Weights:
    return dequantized(layer_of(shape), method)


@cache
def truths_of(shape: tuple[int, int], method: str, rules: Rules) -> list[Truth]:
    return [truth_of(weights_of(shape, method), batch, rules) for batch in batches_of(shape[0])]


def assert_spread(out: torch.Tensor, truth: Truth, freedom: int, what: str) -> None:
    """The mean square of errors over their standard deviation is 1, or less where the model is a bound.

    A sum of d squares stays below d + 2 sqrt(d t) + 2 t but for one case in exp(t) (Laurent and Massart).
    """
    t = 32.0
    most = 1 + 2 * math.sqrt(t / freedom) + 2 * t / freedom
    found = float(((out.double() - truth.out) / (truth.noise + 1e-30)).pow(2).mean())
    assert found <= most, (
        f"{what}: errors are {math.sqrt(found):.3g} times what rounding makes, at most {math.sqrt(most):.3g}"
    )


def check_pairs(batch: Batch, out: torch.Tensor, truth: Truth, smallest: int, what: str) -> int:
    """Each (rows, rank) of the batch on its own. Returns how many there were.

    A row's errors have as many independent causes as its narrowest stage has values: hidden, intermediate or z.
    """
    assert batch.slots is not None
    pairs = sorted(set(zip(batch.ids[:, 0].tolist(), batch.slots.tolist(), strict=True)))
    for expert, slot in pairs:
        mine = (batch.ids[:, 0] == expert) & (batch.slots == slot)
        part = Truth(truth.out[mine], truth.noise[mine])
        rank = RANKS[slot] if slot >= 0 else 0
        name = f"{what}: {int(mine.sum())} of {ROWS[expert]} rows, {f'rank {rank}' if slot >= 0 else 'no adapter'}"
        assert_close(out[mine], part, name)
        assert_spread(out[mine], part, int(mine.sum()) * min(smallest, rank or smallest), name)
    return len(pairs)


@pytest.mark.parametrize("shape", TAILS, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_pair_of_rows_and_rank(isa: str, method: str, nodes: int, shape: tuple[int, int]) -> None:
    moe = build(layer_of(shape), isa, method, threads=nodes, nodes=nodes)
    truths = truths_of(shape, method, Rules.of(method, isa))
    what = f"{isa} {method} {shape[0]}x{shape[1]}, {nodes} pools"
    pairs = 0
    for batch, truth in zip(batches_of(shape[0]), truths, strict=True):
        pairs += check_pairs(batch, forward(moe, batch), truth, min(shape), what)
    assert pairs >= len(ROWS) * len(SLOTS), "every pair was there"


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_pair_alone_in_its_batch(isa: str, method: str, nodes: int) -> None:
    """A small batch is planned otherwise than a large one: its rows are prepared by the calling thread."""
    shape = (65, 200)
    moe = build(layer_of(shape), isa, method, threads=2, nodes=nodes)
    truths = truths_of(shape, method, Rules.of(method, isa))
    for batch, truth in zip(batches_of(shape[0])[:-1], truths, strict=False):
        for expert, rows in enumerate(ROWS):
            mine = batch.ids[:, 0] == expert
            alone = Batch(*(part[mine] for part in (batch.x, batch.ids, batch.weights, batch.slots)))
            assert len(alone.ids) == rows
            what = f"{isa} {method}, {nodes} pools, alone"
            check_pairs(alone, forward(moe, alone), Truth(truth.out[mine], truth.noise[mine]), min(shape), what)
