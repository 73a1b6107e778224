"""Properties of routing: whatever ids and slots a batch has, each token gets the sum of its own experts."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import (
    ISAS,
    METHODS,
    Batch,
    Layer,
    Weights,
    assert_close,
    build,
    dequantized,
    expected_of,
    forward,
    random_layer,
    random_lora,
)
from rounding import Rules

import kt_kernels

EXPERTS, HIDDEN, INTERMEDIATE = 5, 40, 136  # three steps of 64: one for each of three pools


@cache
def the_layer() -> Layer:
    layer = random_layer(EXPERTS, HIDDEN, INTERMEDIATE)
    layer.adapters = {slot: random_lora(layer, rank, seed=slot) for slot, rank in enumerate((1, 17, 8))}
    return layer


@cache
def weights_of(method: str) -> Weights:
    return dequantized(the_layer(), method)


@cache
def the_moe(method: str, isa: str, nodes: int) -> kt_kernels.MoE:
    return build(the_layer(), isa, method, threads=2, nodes=nodes)


def lists(values: st.SearchStrategy[int], size: int) -> st.SearchStrategy[list[int]]:
    """Anything, or the same for all: one expert gets every token, or nobody gets any."""
    anything = st.lists(values, min_size=size, max_size=size)
    return anything | values.map(lambda value: [value] * size)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (T, K) with repetitions and skipped pairs; slots (T,) or none."""
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(0, 6))
    ids = torch.tensor(draw(lists(st.integers(-2, EXPERTS - 1), tokens * top_k)), dtype=torch.int64)
    slots = draw(st.none() | lists(st.integers(-1, 2), tokens))
    return ids.reshape(tokens, top_k), None if slots is None else torch.tensor(slots, dtype=torch.int32)


def batch_of(ids: torch.Tensor, slots: torch.Tensor | None) -> Batch:
    tokens, top_k = ids.shape
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.linspace(-1, 1, tokens * top_k).reshape(tokens, top_k).contiguous()
    return Batch(torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), ids, weights, slots)


ALL_TO_ONE = (torch.full((33, 1), 2), torch.full((33,), 1, dtype=torch.int32))
NONE_TO_ANY = (torch.full((9, 3), -1), torch.full((9,), 1, dtype=torch.int32))
TWICE_IN_ONE_TOKEN = (torch.tensor([[3, 3, 3], [0, 3, 0], [3, -1, 3]]), None)


@settings(max_examples=250, deadline=None)
@given(routing=routings(), method=st.sampled_from(METHODS), isa=st.sampled_from(ISAS), nodes=st.integers(1, 3))
@example(routing=ALL_TO_ONE, method=METHODS[0], isa="auto", nodes=1)
@example(routing=NONE_TO_ANY, method=METHODS[1], isa="auto", nodes=2)
@example(routing=TWICE_IN_ONE_TOKEN, method=METHODS[2], isa="auto", nodes=3)
def test_any_routing(routing: tuple[torch.Tensor, torch.Tensor | None], method: str, isa: str, nodes: int) -> None:
    moe, batch = the_moe(method, isa, nodes), batch_of(*routing)
    out = forward(moe, batch)
    expected = expected_of(weights_of(method), batch, Rules.of(method, moe.isa))
    assert_close(out, expected, f"{moe.isa} {method}, {nodes} pools")
    bare = (routing[0] < 0).all(-1)
    assert torch.equal(out[bare], torch.zeros_like(out[bare])), "a token without experts is zero"


@settings(max_examples=60, deadline=None)
@given(routing=routings(), method=st.sampled_from(METHODS), data=st.data())
def test_tokens_do_not_know_each_other(
    routing: tuple[torch.Tensor, torch.Tensor | None], method: str, data: st.DataObject
) -> None:
    """One token alone, or among others in another order: the same bits, where rows are summed one by one.

    Only the reference does: other kernels sum few rows in another order than many.
    """
    ids, slots = routing
    order = torch.tensor(data.draw(st.permutations(range(len(ids))), label="order"), dtype=torch.int64)
    batch, moe = batch_of(ids, slots), the_moe(method, "reference", 1)
    moved = Batch(batch.x[order], ids[order], batch.weights[order], None if slots is None else slots[order])
    assert torch.equal(forward(moe, moved), forward(moe, batch)[order])
    for token in range(min(len(ids), 3)):
        one = slice(token, token + 1)
        alone = Batch(batch.x[one], ids[one], batch.weights[one], None if slots is None else slots[one])
        assert torch.equal(forward(moe, alone), forward(moe, batch)[one])
