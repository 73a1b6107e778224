"""Whole layers, mostly without adapters, against the float64 oracle: rows, tails, pools, routings."""

from __future__ import annotations

import psutil
import pytest
import torch
from reference import (
    Batch,
    assert_close,
    build,
    check,
    expected_forward,
    forward,
    random_batch,
    random_layer,
    random_lora,
    relative_l2,
)

ROWS = [*range(1, 18), 31, 64, 100]


def test_every_row_count_on_one_expert(isa: str, method: str) -> None:
    layer = random_layer(3, 136, 100)
    moe = build(layer, isa, method)
    for rows in ROWS:
        batch = random_batch(layer, rows, 1, seed=rows)
        batch.ids.fill_(1)
        check(layer, moe, batch, f"{rows} rows")


@pytest.mark.parametrize("rows", [129, 257, 800])
def test_more_rows_than_a_task_takes_at_once(isa: str, method: str, rows: int) -> None:
    """Rows are gathered 128 at a time and handed out 768 at a time; an adapter's segment may be longer than either."""
    layer = random_layer(2, 100, 70)
    layer.adapters = {0: random_lora(layer, 17), 1: random_lora(layer, 8, seed=5)}
    batch = random_batch(layer, rows, 2, slots=(0, 0, 0, 1, -1))
    check(layer, build(layer, isa, method), batch, f"{rows} rows")


@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [(1, 1), (2, 3), (15, 17), (33, 31), (64, 64), (65, 63), (130, 200), (257, 321), (96, 1100), (1100, 96)],
)
def test_every_tail(isa: str, method: str, hidden: int, intermediate: int) -> None:
    layer = random_layer(2, hidden, intermediate)
    moe = build(layer, isa, method)
    for tokens in (1, 7, 20):
        check(layer, moe, random_batch(layer, tokens, 2, seed=tokens), f"{tokens} tokens")


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_any_pool_count(isa: str, method: str, nodes: int) -> None:
    layer = random_layer(2, 70, 352)
    whole = forward(build(layer, isa, method), batch := random_batch(layer, 9, 2))
    split = check(layer, build(layer, isa, method, threads=2, nodes=nodes), batch, f"{nodes} pools")
    assert relative_l2(split, whole) < 0.03


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_deepseek_intermediate_splits_into_any_pool_count(method: str, nodes: int) -> None:
    layer = random_layer(1, 64, 1408)
    check(layer, build(layer, "auto", method, nodes=nodes), random_batch(layer, 5, 1), f"1408 in {nodes} pools")


def test_more_pools_than_steps_of_the_intermediate(method: str) -> None:
    layer = random_layer(2, 64, 40)
    check(layer, build(layer, "auto", method, threads=3, nodes=3), random_batch(layer, 5, 2))


def test_empty_experts_and_skipped_pairs(isa: str, method: str) -> None:
    layer = random_layer(6, 72, 48)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 12, 3)
    batch.ids[batch.ids == 2] = 4  # nobody goes to expert 2, some go to 4 twice
    batch.ids[::3, 1] = -1
    batch.ids[5] = -1
    out = check(layer, moe, batch)
    assert torch.equal(out[5], torch.zeros(72)), "a token with no expert is zero"


def test_duplicate_ids_count_twice(isa: str) -> None:
    layer = random_layer(2, 40, 24)
    moe = build(layer, isa)
    once = random_batch(layer, 4, 1)
    twice = Batch(once.x, once.ids.repeat(1, 2), once.weights.repeat(1, 2))
    check(layer, moe, twice)
    assert relative_l2(forward(moe, twice), 2 * forward(moe, once)) < 1e-6


def test_no_tokens(method: str) -> None:
    layer = random_layer(2, 32, 32)
    assert forward(build(layer, "auto", method), random_batch(layer, 0, 2)).shape == (0, 32)


def test_no_experts_a_token() -> None:
    layer = random_layer(2, 32, 32)
    batch = random_batch(layer, 3, 1)
    out = forward(
        build(layer, "auto"), Batch(batch.x, batch.ids[:, :0].contiguous(), batch.weights[:, :0].contiguous())
    )
    assert torch.equal(out, torch.zeros(3, 32))


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_id_types_and_output_types(isa: str, id_type: torch.dtype, dtype: torch.dtype) -> None:
    layer = random_layer(3, 52, 36)
    moe = build(layer, isa)
    batch = random_batch(layer, 6, 2)
    batch.ids = batch.ids.to(id_type)
    assert_close(forward(moe, batch, dtype), expected_forward(layer, batch, moe.method, isa), f"{isa} {dtype}")


def test_rows_of_a_wider_tensor_are_read_and_written_in_place(isa: str) -> None:
    layer = random_layer(2, 48, 32)
    moe = build(layer, isa)
    batch = random_batch(layer, 5, 2)
    wide_x = torch.randn(5, 100).bfloat16()
    wide_x[:, :48] = batch.x
    wide_out = torch.full((5, 90), 7.0)
    moe.forward(wide_x[:, :48], batch.ids, batch.weights, None, wide_out[:, :48])
    assert torch.equal(wide_out[:, :48], forward(moe, batch))
    assert (wide_out[:, 48:] == 7).all()


def test_the_same_call_gives_the_same_bits(isa: str, method: str) -> None:
    layer = random_layer(4, 80, 112)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 33, 3)
    first = forward(moe, batch)
    assert all(torch.equal(first, forward(moe, batch)) for _ in range(3))


def test_long_prefill_in_chunks_is_the_same_as_token_by_token() -> None:
    """Scratch is bounded, so a long batch runs in pieces; rows find their tokens in each.

    Kernels of few and of many rows sum in another order, which may flip the rounding of an intermediate value to
    bfloat16: at most eps / 2 of the result. Another token's row would be off by more than 1.
    """
    layer = random_layer(2, 1024, 64)
    moe = build(layer, "auto")
    batch = random_batch(layer, 90_000, 2)
    before = psutil.Process().memory_info().rss
    out = forward(moe, batch)
    grown = psutil.Process().memory_info().rss - before - out.nbytes
    assert grown < 700 << 20, f"{grown >> 20} MiB: all rows at once would take 960"
    for token in (0, 1, *range(4_999, 90_000, 5_000), 89_998, 89_999):
        one = Batch(*(part[token : token + 1].contiguous() for part in (batch.x, batch.ids, batch.weights)))
        assert relative_l2(out[token : token + 1], forward(moe, one)) < 2.0**-9, f"token {token}"


def test_infinite_activations_show_in_the_result(isa: str, method: str) -> None:
    layer = random_layer(2, 64, 64)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 3, 1)
    batch.x[1, 5] = float("nan")
    out = forward(moe, batch)
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2]]).all()


def test_silu_is_exact_over_its_whole_range(isa: str) -> None:
    """A gate of every size through a layer that does nothing else: a polynomial in the wrong order was 11 % off."""
    gates = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-90.0, -200.0, 100.0, 1e-6, -1e-6])]).bfloat16()
    layer = random_layer(1, 1, 1)
    layer.gate.fill_(1.0), layer.up.fill_(1.0), layer.down.fill_(1.0)
    batch = Batch(gates[:, None].clone(), torch.zeros(len(gates), 1, dtype=torch.int64), torch.ones(len(gates), 1))
    out = forward(build(layer, isa), batch)[:, 0].double()
    x = gates.double()
    expected = torch.nn.functional.silu(x) * x
    error = (out - expected).abs() / expected.abs().clamp(min=1e-30)
    bound = 2**-8 if isa in ("amx", "amx_model", "avx512_bf16") else 1e-6
    significant = expected.abs() > 1e-25
    assert error[significant].max() < bound, f"worst at gate {x[significant][error[significant].argmax()]}"


@pytest.mark.parametrize("rows", [1, 300])
def test_a_profile_counts_each_weight_once(isa: str, method: str, rows: int) -> None:
    """However many panels of rows pass over it; from zero each time that it is switched on."""
    layer = random_layer(2, 128, 64)
    moe = build(layer, isa, method)
    batch = random_batch(layer, rows, 2)
    assert moe.read_profile() is None
    for _ in range(2):
        moe.set_profiling(True)
        forward(moe, batch)
        counts = moe.read_profile()
        assert counts is not None
        assert counts["gate_up"]["bytes"] > counts["down"]["bytes"] > 0
        assert moe.packed_bytes - 4096 < counts["gate_up"]["bytes"] + counts["down"]["bytes"] <= moe.packed_bytes
        assert all(counts[phase]["ns"] > 0 for phase in ("route", "gate_up", "activate", "down", "combine"))
    moe.set_profiling(False)
    forward(moe, batch)
    assert moe.read_profile() is None
