"""Experts brought to the device in pieces, on a CPU device: the packed bytes become the weights again, and a layer
gives what kt_kernels and float32 give, adapters included. What only a card has (streams, registered memory) is not
here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import interpreted
from streamed_layer import EPS, FORMATS, batch, case, close, draw

import kt_kernels

ISAS = (*kt_kernels.isas(), "amx_model")
SIZES = [(128, 192), (50, 100)]
"""Hidden and intermediate; the last is padded."""


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize(("sizes", "nodes"), [((64, 64), 1), ((128, 192), 2), ((50, 100), 3)], ids=str)
def test_packed_bytes_become_the_weights_again(method: str, isa: str, sizes: tuple[int, int], nodes: int) -> None:
    from kt_sglang.prompts.unpacking import ROWS, padded

    hidden, inner = sizes
    layer = case(method, hidden, inner, experts=3, isa=isa, nodes=nodes)
    source = layer.source()
    gate_up = torch.full((3, 2, padded(inner), padded(hidden)), 7.0, dtype=torch.bfloat16)
    down = torch.full((3, padded(hidden, ROWS), padded(inner)), 7.0, dtype=torch.bfloat16)
    for shard, packed in zip(source.shards, source.packed, strict=True):
        shard.unpack(packed, gate_up, down)
    for expert, (gate, up, down_) in enumerate(layer.weights):
        assert torch.equal(gate_up[expert, 0, :inner, :hidden], gate)
        assert torch.equal(gate_up[expert, 1, :inner, :hidden], up)
        assert torch.equal(down[expert, :hidden, :inner], down_)
    for rest in (gate_up[:, :, inner:], gate_up[..., hidden:], down[:, hidden:], down[..., inner:]):
        assert not rest.any()


@pytest.fixture(scope="module")
def said() -> list[str]:
    return interpreted(INTERPRETED, *FORMATS.values()).splitlines()


@pytest.mark.parametrize("method", FORMATS)
def test_kernels_of_a_card_give_what_plain_torch_gives(method: str, said: list[str]) -> None:
    name = FORMATS[method]
    assert [line for line in said if line.startswith(name)] == [f"{name} same"] * 2


INTERPRETED = """
import sys, torch
from kt_sglang.prompts import unpacking, unpack_kernels
plain = unpacking._IN_TORCH
for name in sys.argv[1:]:
    shard = unpacking.Shard(name, hidden=320, begin=64, width=64)
    packed = torch.randint(0, 256, (2, shard.expert_bytes), dtype=torch.uint8)
    gate_up, down = packed[:, :shard.gate_up_bytes], packed[:, shard.gate_up_bytes:][:, :shard.down_bytes]
    for part, inputs in ((gate_up, 320), (down, 64)):
        rest = part.unflatten(1, (-1, unpacking.block_bytes(name, inputs)))
        cut = {"bf16": 32, "int8": 16, "int4": 8}[name] * inputs
        scales = rest[..., cut:]
        powers = {"int8": torch.float32, "int4": torch.bfloat16}.get(name, torch.uint8)  # the interpreter cuts off bits
        if name != "bf16":
            exponents = torch.randint(-9, 3, (*scales.shape[:2], scales.shape[2] // powers.itemsize)).float()
            scales.copy_(torch.exp2(exponents).to(powers).view(torch.uint8))
    sizes = ((2, 2, 192, 320), (2, 320, 192))
    one, other = ([torch.zeros(size, dtype=torch.bfloat16) for size in sizes] for _ in "ab")
    unpacking._IN_TORCH = plain
    shard.unpack(packed, *one)
    unpacking._IN_TORCH = {name: lambda blocks, rows: unpack_kernels.unpack(name, blocks, rows)}
    shard.unpack(packed, *other)
    for a, b in zip(one, other):
        print(name, "same" if a.any() and torch.equal(a.view(torch.int16), b.view(torch.int16)) else "differs")
"""


def test_no_kernel_of_a_card_is_compiled_again_for_another_batch() -> None:
    """Numbers that follow a batch's routing, and addresses within what it is cut into, are not specialized."""
    from kt_sglang.prompts import streamed_kernels

    def general(kernel: Any) -> set[str]:
        return {each.name for each in kernel.params if each.do_not_specialize or each.do_not_specialize_on_alignment}

    assert general(streamed_kernels._weighted_sum) == {"nowhere"}
    assert general(streamed_kernels._add_rows) == {"end", "weights"}
    assert general(streamed_kernels._silu_and_mul) == set()


def test_sums_of_a_card_give_what_plain_torch_gives() -> None:
    interpreted(SUMS)


SUMS = """
import torch
from kt_sglang.prompts import streamed_kernels, streamed_sums
rows = torch.randn(5, 2 * 192).bfloat16()
for more in ((), (torch.randn(5, 2 * 192).bfloat16(),)):
    there, here = (module.silu_and_mul(rows, *more) for module in (streamed_kernels, streamed_sums))
    torch.testing.assert_close(there, here, rtol=8e-3, atol=1e-6)
    gate, up = (rows.float() + sum(more)).chunk(2, dim=1)
    torch.testing.assert_close(here.float(), gate.sigmoid() * gate * up, rtol=8e-3, atol=1e-6)
rows, places, weights = torch.randn(12, 112).bfloat16(), torch.randperm(12).view(4, 3), torch.rand(4, 3)
rows[:2], weights.view(-1)[(places.view(-1) < 2)] = float("nan"), float("nan")
for out in (torch.empty(4, 100), torch.empty(4, 100, dtype=torch.bfloat16)):
    there = torch.empty_like(out)
    streamed_sums.weighted_sum(out, rows, places, weights, 2)
    streamed_kernels.weighted_sum(there, rows, places, weights, 2)
    assert out.isfinite().all() and out.abs().sum() > 0
    torch.testing.assert_close(there, out)
"""


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "base"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("each", [1, 3, 16])
def test_a_layer_gives_what_kt_kernels_and_float32_give(
    method: str, sizes: tuple[int, int], adapted: bool, each: int
) -> None:
    from kt_model.methods import method_of
    from kt_sglang.prompts.streamed import Counts, Streamer

    layer = case(method, *sizes, nodes=2)
    source = layer.source(adapters=adapted)
    x, ids, scores, slots = batch(11, sizes[0], 7)
    chosen = slots if adapted else None
    before = [each.clone() for each in (x, ids, scores, slots)]
    counts, streamer = Counts(), Streamer(source, each, 2, torch.device("cpu"))
    out = streamer.run(source, x, ids, scores, chosen, counts)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert all(torch.equal(one, then) for one, then in zip((x, ids, scores, slots), before, strict=True))
    close(out, layer.in_float32(x, ids, scores, chosen), 2 * EPS)
    close(out, layer.on_cpu(x, ids, scores, chosen), 2 * EPS + method_of(method).reference_limit)
    if adapted:
        bare = slots < 0
        base = streamer.run(source, x, ids, scores, None)
        assert torch.equal(out[bare], base[bare])
        close(out[~bare] - base[~bare], layer.in_float32(x, ids, scores, slots)[~bare] - base[~bare].float(), 0.05)
    assert counts.bytes == sum(source.packed[shard].nbytes for shard in range(2))


def test_only_experts_that_the_batch_hits_are_brought() -> None:
    from kt_sglang.prompts.streamed import Counts, Streamer

    layer = case("AMXBF16_SFT", 64, 64, experts=9)
    source, counts = layer.source(), Counts()
    ids = torch.tensor([[1, 2, 8], [8, -1, 5]])
    x, scores = draw(2, 64, size=1, seed=1), torch.ones(2, 3)
    streamer = Streamer(source, 2, 2, torch.device("cpu"))
    out = streamer.run(source, x, ids, scores, None, counts)
    assert counts.bytes == 4 * source.shards[0].expert_bytes
    close(out, layer.in_float32(x, ids, scores, None), 2 * EPS)
    none = streamer.run(source, x, torch.full((2, 3), -1), scores, None, counts)
    assert not none.any() and counts.bytes == 4 * source.shards[0].expert_bytes


@pytest.mark.parametrize("here", [6, 2, -1], ids=str)
def test_tokens_of_adapters_are_counted_wherever_their_experts_are(here: int) -> None:
    """Resident experts have id -1; the proof counts tokens that were computed this way, not choices."""
    from kt_sglang.prompts.streamed import Counts, Streamer

    layer = case("AMXBF16_SFT", 64, 64)
    source, counts = layer.source(adapters=True), Counts()
    x, ids, scores, slots = batch(12, 64, 7)
    ids = torch.where(ids <= here, ids, -1)
    streamer = Streamer(source, 2, 2, torch.device("cpu"))
    out = streamer.run(source, x, ids, scores, slots, counts)
    assert (counts.tokens, counts.adapter_tokens) == (12, int((slots >= 0).sum())) == (12, 8)
    expected = layer.in_float32(x, ids, scores, slots)
    assert torch.equal(out.any(dim=1), expected.any(dim=1))
    if here >= 0:
        close(out, expected, 2 * EPS)
    streamer.run(source, x, ids, scores, None, counts)
    assert (counts.tokens, counts.adapter_tokens) == (24, 8)


@pytest.mark.parametrize("buffers", [2, 3])
def test_the_next_layer_is_brought_ahead_where_all_experts_are_hit(buffers: int) -> None:
    """And what came ahead is used, whatever that layer's router says, or left where another layer is next."""
    from kt_sglang.prompts.streamed import Counts, Streamer

    first, second = case("AMXBF16_SFT", 64, 64), case("AMXBF16_SFT", 64, 64, nodes=1)
    one, other = first.source(), second.source(adapters=True)
    other.layer, one.following = 1, other
    streamer, counts = Streamer(one, 2, buffers, torch.device("cpu")), Counts()
    x, ids, scores, slots = batch(12, 64, 7)
    layer_bytes = one.packed[0].nbytes
    for seen, chosen in ((ids, slots), (ids.clamp(max=0), None), (ids.clamp(min=6), slots)):
        counts.bytes = 0
        close(streamer.run(one, x, ids, scores, None, counts), first.in_float32(x, ids, scores, None), 2 * EPS)
        ahead = layer_bytes + 2 * buffers * one.shards[0].expert_bytes
        assert counts.bytes == min(ahead, 2 * layer_bytes)
        out = streamer.run(other, x, seen, scores, chosen, counts)
        close(out, second.in_float32(x, seen, scores, chosen), 2 * EPS)
        if seen is ids:
            assert counts.bytes == 2 * layer_bytes
    streamer.run(one, x, ids, scores, None, counts)
    close(streamer.run(one, x, ids, scores, None, counts), first.in_float32(x, ids, scores, None), 2 * EPS)


def test_after_the_last_layer_the_first_one_is_brought_for_the_next_batch() -> None:
    from kt_sglang.prompts.streamed import Counts, Streamer

    first, second = case("AMXBF16_SFT", 64, 64), case("AMXBF16_SFT", 64, 64)
    one, other = first.source(adapters=True), second.source(adapters=True)
    other.layer, one.following, other.following, other.is_last = 1, other, one, True
    streamer, counts = Streamer(one, 2, 2, torch.device("cpu")), Counts()
    x, ids, scores, slots = batch(12, 64, 7)
    for chosen in (slots, None, slots.flip(0)):
        counts.bytes = 0
        for source, layer in ((one, first), (other, second)):
            out = streamer.run(source, x, ids, scores, chosen, counts)
            close(out, layer.in_float32(x, ids, scores, chosen), 2 * EPS)
    assert counts.bytes == 2 * one.packed[0].nbytes


def test_adapters_of_some_experts_are_found_among_those_of_all() -> None:
    """The pools hold resident experts, too."""
    from kt_sglang.prompts.streamed import Streamer

    layer = case("AMXINT8_SFT", 128, 64)
    source = layer.source(adapters=True, in_pools=[0, 1, 3, 4, 6, 8, 9])
    x, ids, scores, slots = batch(8, 128, 7)
    out = Streamer(source, 3, 2, torch.device("cpu")).run(source, x, ids, scores, slots)
    close(out, layer.in_float32(x, ids, scores, slots), 2 * EPS)


@pytest.mark.parametrize("each", [2, 7])
def test_factors_of_one_batch_are_not_left_to_the_next(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is shared by layers and batches, whichever slots and experts these use."""
    from kt_sglang.prompts import streamed_factors
    from kt_sglang.prompts.streamed import Streamer

    layer = case("AMXBF16_SFT", 64, 64)
    source = layer.source(adapters=True)
    of_one_expert = 2 * 3 * source.factor_sizes.expert_values
    monkeypatch.setattr(streamed_factors, "MOST_FACTOR_BYTES", 4 * of_one_expert)
    streamer = Streamer(source, each, 2, torch.device("cpu"))
    x, ids, scores, slots = batch(12, 64, 7)
    for chosen in (slots, torch.zeros_like(slots), torch.full_like(slots, 2), None, slots.flip(0), slots.clamp(max=0)):
        for seen in (ids, ids.clamp(min=5), ids.clamp(max=0)):
            close(streamer.run(source, x, seen, scores, chosen), layer.in_float32(x, seen, scores, chosen), 2 * EPS)


@pytest.mark.parametrize("most", [1, 4, 6, 9, 1023])
@pytest.mark.parametrize("ahead", [2, 7])
def test_no_more_groups_are_multiplied_at_once_than_a_card_takes(
    most: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many adapters in one batch a piece has more: a group for each expert and slot, and one for the bare base."""
    from kt_sglang.prompts import streamed, streamed_sums

    multiplied, grouped = list[int](), streamed_sums.grouped

    def counted(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        assert len(weights) == len(ends)
        multiplied.append(len(weights))
        return grouped(rows, weights, ends)

    monkeypatch.setattr(streamed, "MOST_GROUPS", most)
    monkeypatch.setattr(streamed, "grouped", counted)
    layer = case("AMXINT8_SFT", 128, 64)
    source = layer.source(adapters=True)
    source.following = source  # brought ahead, too
    streamer = streamed.Streamer(source, ahead, 4, torch.device("cpu"))
    x, ids, scores, slots = batch(40, 128, 7)
    for chosen in (slots, None, torch.zeros_like(slots), slots):
        for seen in (ids, ids, ids.clamp(min=5), ids.clamp(max=0)):
            multiplied.clear()
            out = streamer.run(source, x, seen, scores, chosen)
            close(out, layer.in_float32(x, seen, scores, chosen), 2 * EPS)
            groups_of_an_expert = 1 if chosen is None else 3 if chosen is slots else 2
            assert max(multiplied) <= max(most, groups_of_an_expert)


def test_other_bytes_than_the_layout_says_are_refused() -> None:
    from kt_sglang.prompts.streamed import CannotStream, LayerSource

    with pytest.raises(CannotStream, match=r"layer 3: .* packed bytes, expected"):
        LayerSource.of(3, case("AMXINT8_SFT", 64, 64).moe, "int4")


def test_pools_lie_on_pages_of_their_own() -> None:
    """Two in one page could not both be registered with a card."""
    from kt_sglang.adapters.lora import _ExpertPoolsOnHost

    with _ExpertPoolsOnHost():
        pools = [torch.zeros((2, 3, 4, size), dtype=torch.bfloat16, device="cuda") for size in (5, 4096)]
        other = torch.zeros((2, 3), dtype=torch.float32, device="cpu")
    for pool in pools:
        assert pool.device.type == "cpu" and pool.data_ptr() % 4096 == 0 and pool.is_contiguous() and not pool.any()
        pool[1, 2] = 1
        assert float(pool.float().sum()) == 4 * pool.shape[3]
    assert other.shape == (2, 3)
