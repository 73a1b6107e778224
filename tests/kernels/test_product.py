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
    ISAS,
    Batch,
    Expected,
    Layer,
    assert_close,
    build,
    dequantized,
    expected_of_all,
    forward,
    random_layer,
    random_lora,
)
from rounding import Rules

import kt_kernels

ROWS = [*range(1, 18), 31, 64, 100]
RANKS = [0, 1, 8, 16, 17, 64]
SLOTS = range(-1, len(RANKS))  # -1: no adapter
LARGE = 50_000
TAILS = [(1, 1), (15, 17), (33, 31), (64, 64), (65, 63), (130, 200), (257, 321), (96, 1100), (1100, 96)]


@cache
def layer_of(shape: tuple[int, int]) -> Layer:
    layer = random_layer(len(ROWS), *shape)
    for slot, rank in enumerate(RANKS):
        layer.adapters[slot] = random_lora(layer, rank, scale=0.5 + slot, seed=slot)
    return layer


@cache
def packed_adapters(shape: tuple[int, int]) -> dict[int, kt_kernels.Adapter]:
    """Packed once for all layers of a shape, as in a server: they do not depend on method, instruction set or pools."""
    return {slot: lora.packed() for slot, lora in layer_of(shape).adapters.items()}


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
def expected_in(shape: tuple[int, int], method: str) -> dict[Rules, list[Expected]]:
    """Of each batch, for all rules that instruction sets have.

    After all turns each token has met each slot, so what the last batch must give is among them.
    """
    rules = {Rules.of(method, isa) for isa in ISAS}
    weights, (*turns, mixed) = dequantized(layer_of(shape), method), batches_of(shape[0])
    by_turn = [expected_of_all(weights, batch, rules) for batch in turns]
    slots = torch.stack([slots_of(batch) for batch in turns])
    turn = (slots == slots_of(mixed)).int().argmax(0)
    token = torch.arange(len(turn))

    def of_rules(rule: Rules) -> list[Expected]:
        found = [expected[rule] for expected in by_turn]
        out, noise = torch.stack([one.out for one in found]), torch.stack([one.noise for one in found])
        return [*found, Expected(out[turn, token], noise[turn, token])]

    return {rule: of_rules(rule) for rule in rules}


def slots_of(batch: Batch) -> torch.Tensor:
    assert batch.slots is not None
    return batch.slots


def turns_of(isa: str, nodes: int, shape: tuple[int, int]) -> slice:
    """Which batches a layer is asked for: all, but only the mixed one where `reference` divides a large layer among
    pools. That has one plain loop for every size, and the division is moe.cpp's, the same for all instruction sets."""
    return slice(-1, None) if isa == "reference" and nodes > 1 and math.prod(shape) > LARGE else slice(None)


def build_with_adapters(shape: tuple[int, int], isa: str, method: str, threads: int, nodes: int) -> kt_kernels.MoE:
    layer = layer_of(shape)
    moe = build(Layer(layer.gate, layer.up, layer.down), isa, method, threads, nodes)
    for slot, adapter in packed_adapters(shape).items():
        moe.set_adapter(slot, adapter)
    return moe


def assert_spread(out: torch.Tensor, expected: Expected, pair: torch.Tensor, freedom: torch.Tensor, what: str) -> None:
    """The mean square of errors over their standard deviation is 1 in each pair, or less where the model is a bound.

    A sum of d squares stays below d + 2 sqrt(d t) + 2 t but for one case in exp(t) (Laurent and Massart). `pair` is the
    index of each token's pair, `freedom` each pair's d.
    """
    t = 32.0
    most = 1 + 2 * (t / freedom).sqrt() + 2 * t / freedom
    squares = ((out.double() - expected.out) / (expected.noise + 1e-30)).pow(2).mean(1)
    tokens = torch.bincount(pair, minlength=len(freedom))
    found = torch.zeros(len(freedom), dtype=torch.float64).index_add_(0, pair, squares) / tokens
    worst = int((found / most).nan_to_num(nan=math.inf).argmax())
    assert found[worst] <= most[worst], (
        f"{what}: errors of pair {worst} are {float(found[worst].sqrt()):.3g} times what rounding makes, "
        f"at most {float(most[worst].sqrt()):.3g}"
    )


def check_pairs(batch: Batch, out: torch.Tensor, expected: Expected, smallest: int, what: str) -> int:
    """Each (rows, rank) of the batch on its own. Returns how many there were.

    A row's errors have as many independent causes as its narrowest stage has values: hidden, intermediate or z.
    """
    code = batch.ids[:, 0] * len(SLOTS) + slots_of(batch) + 1
    pairs, pair, rows = code.unique(return_inverse=True, return_counts=True)
    experts, slots = (pairs // len(SLOTS)).tolist(), (pairs % len(SLOTS) - 1).tolist()
    ranks = [RANKS[slot] if slot >= 0 else 0 for slot in slots]
    narrowest = torch.tensor([min(smallest, rank or smallest) for rank in ranks])

    def name(index: int) -> str:
        return f"{int(rows[index])} of {ROWS[experts[index]]} rows, slot {slots[index]} of rank {ranks[index]}"

    names = f"{what} (pairs: {', '.join(f'{index} is {name(index)}' for index in range(len(experts)))})"
    assert_close(out, expected, names if len(experts) <= len(ROWS) else what)
    assert_spread(out, expected, pair, (rows * narrowest).double(), names)
    return len(experts)


@pytest.mark.parametrize("shape", TAILS, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_pair_of_rows_and_rank(isa: str, method: str, nodes: int, shape: tuple[int, int]) -> None:
    moe = build_with_adapters(shape, isa, method, threads=nodes, nodes=nodes)
    expected_by_batch = expected_in(shape, method)[Rules.of(method, isa)]
    what = f"{isa} {method} {shape[0]}x{shape[1]}, {nodes} pools"
    turns, pairs = turns_of(isa, nodes, shape), 0
    for batch, expected in zip(batches_of(shape[0])[turns], expected_by_batch[turns], strict=True):
        pairs += check_pairs(batch, forward(moe, batch), expected, min(shape), what)
    assert pairs >= len(ROWS) * (len(SLOTS) if turns == slice(None) else 1), "every pair was there"


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_every_pair_alone_in_its_batch(isa: str, method: str, nodes: int) -> None:
    """A small batch is planned otherwise than a large one: its rows are prepared by the calling thread."""
    shape = (65, 200)
    moe = build_with_adapters(shape, isa, method, threads=2, nodes=nodes)
    expected_by_batch = expected_in(shape, method)[Rules.of(method, isa)]
    for batch, expected in zip(batches_of(shape[0])[:-1], expected_by_batch, strict=False):
        for expert, rows in enumerate(ROWS):
            mine = batch.ids[:, 0] == expert
            alone = Batch(batch.x[mine], batch.ids[mine], batch.weights[mine], slots_of(batch)[mine])
            assert len(alone.ids) == rows
            part = Expected(expected.out[mine], expected.noise[mine])
            check_pairs(alone, forward(moe, alone), part, min(shape), f"{isa} {method}, {nodes} pools, alone")
