"""Experts brought to the device in pieces, on a CPU device: the packed bytes become the weights again, and a layer
gives what kt_kernels and float32 give, adapters included. What only a card has (streams, registered memory) is not
here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kt_kernels

EPS = 2.0**-8
SLOTS, RANK, POOL_RANK = 4, 3, 5
FORMATS = {"AMXBF16_SFT": "bf16", "AMXINT8_SFT": "int8", "AMXINT4_SFT": "int4"}
ISAS = (*kt_kernels.isas(), "amx_model")
SIZES = [(128, 192), (50, 100)]
"""Hidden and intermediate; the last is padded."""


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


def draw(*shape: int, size: float, seed: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


@dataclass
class Case:
    """A layer's weights, as they are after quantizing, and its adapters in two of SGLang's slots, B scaled."""

    weights: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    moe: kt_kernels.MoE
    method: str
    factors: dict[int, tuple[torch.Tensor, ...]]

    @property
    def number_format(self) -> str:
        return FORMATS[self.method]

    def pools(self, in_pools: list[int], experts: int) -> tuple[torch.Tensor, ...]:
        """As lora.py describes them; `in_pools`: where this layer's experts stand among all."""
        (hidden, inner) = self.weights[0][2].shape
        a = torch.zeros(SLOTS, experts, 2 * POOL_RANK, hidden, dtype=torch.bfloat16)
        b = torch.zeros(SLOTS, experts, 2 * inner, POOL_RANK, dtype=torch.bfloat16)
        down_a = torch.zeros(SLOTS, experts, POOL_RANK, inner, dtype=torch.bfloat16)
        down_b = torch.zeros(SLOTS, experts, hidden, POOL_RANK, dtype=torch.bfloat16)
        for slot, (gate_a, gate_b, up_a, up_b, da, db) in self.factors.items():
            a[slot, in_pools, :RANK], a[slot, in_pools, POOL_RANK : POOL_RANK + RANK] = gate_a, up_a
            b[slot, in_pools, :inner, :RANK], b[slot, in_pools, inner:, :RANK] = gate_b, up_b
            down_a[slot, in_pools, :RANK], down_b[slot, in_pools, :, :RANK] = da, db
        return a, b, down_a, down_b

    def source(self, *, adapters: bool = False, in_pools: list[int] | None = None) -> Any:
        from kt_sglang.streamed import LayerSource

        source = LayerSource.of(0, self.moe, self.number_format)
        if adapters:
            places = in_pools or list(range(len(self.weights)))
            source.pools, source.in_pools = self.pools(places, max(places) + 1), in_pools or ()
        return source

    def on_cpu(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, slots: Any) -> torch.Tensor:
        out = torch.empty(x.shape)
        self.moe.forward(x, ids.int(), scores, None if slots is None else slots.int(), out)
        return out

    def in_float32(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, slots: Any) -> torch.Tensor:
        out = torch.zeros(x.shape)
        for token, row in enumerate(ids.tolist()):
            for choice, expert in enumerate(row):
                if expert < 0:
                    continue
                gate, up, down = (each.float() for each in self.weights[expert])
                slot = -1 if slots is None else int(slots[token])
                if slot in self.factors:
                    ga, gb, ua, ub, da, db = (each[expert].float() for each in self.factors[slot])
                    gate, up, down = gate + gb @ ga, up + ub @ ua, down + db @ da
                here = x[token].float()
                inner = torch.nn.functional.silu(gate @ here) * (up @ here)
                out[token] += scores[token, choice] * (down @ inner)
        return out


def case(method: str, hidden: int, inner: int, *, experts: int = 7, isa: str = "auto", nodes: int = 1) -> Case:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    originals = [
        tuple(draw(*shape, size=0.1, seed=3 * expert + at) for at, shape in enumerate(shapes))
        for expert in range(experts)
    ]
    moe = kt_kernels.MoE(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=inner,
        method=method,
        isa=isa,
        pool=kt_kernels.ThreadPool(nodes, nodes=nodes),
    )
    for expert, matrices in enumerate(originals):
        moe.load_expert(expert, *matrices)
    shapes_of_factors = ((RANK, hidden), (inner, RANK), (RANK, hidden), (inner, RANK), (RANK, inner), (hidden, RANK))
    factors = {
        slot: tuple(draw(experts, *shape, size=0.2, seed=100 * slot + at) for at, shape in enumerate(shapes_of_factors))
        for slot in (0, 2)
    }
    for slot, each in factors.items():
        moe.set_adapter(slot, kt_kernels.Adapter(*each))
    return Case([stored(method, matrices) for matrices in originals], moe, method, factors)


def stored(method: str, matrices: tuple[torch.Tensor, ...]) -> Any:
    """What the method keeps of bfloat16 matrices, in float32 rounded to bfloat16."""
    if method == "AMXBF16_SFT":
        return matrices
    arrays = kt_kernels.quantize_expert(matrices[0], matrices[1], matrices[2], method)
    found = []
    for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
        values, inputs = torch.from_numpy(arrays[name]), matrix.shape[1]
        if method == "AMXINT8_SFT":
            whole = values.float() * torch.from_numpy(arrays[f"{name}_scale"]).unsqueeze(1)
        else:
            scales = torch.from_numpy(arrays[f"{name}_scale"]).view(torch.bfloat16).float()
            numbers = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)[:, :inputs].float() - 8
            whole = numbers * scales.repeat_interleave(32, dim=1)[:, :inputs]
        found.append(whole.bfloat16())
    return tuple(found)


def batch(tokens: int, hidden: int, experts: int, top_k: int = 3) -> tuple[torch.Tensor, ...]:
    """x, ids (one of them nobody's), scores, slots: both adapters, an empty slot's number never, and the base."""
    dice = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=dice)[:top_k] for _ in range(tokens)])
    ids[0, 1] = -1
    x = torch.randn(tokens, hidden, generator=dice).bfloat16()
    slots = torch.tensor([0, -1, 2, 2, 0, -1])[torch.arange(tokens) % 6]
    return x, ids, torch.rand(tokens, top_k, generator=dice), slots


def close(one: torch.Tensor, other: torch.Tensor, limit: float) -> None:
    error = float((one.float() - other.float()).norm() / other.float().norm())
    assert error <= limit, f"relative L2 error {error:.2g}, expected at most {limit:.2g}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize(("sizes", "nodes"), [((64, 64), 1), ((128, 192), 2), ((50, 100), 3)], ids=str)
def test_packed_bytes_become_the_weights_again(method: str, isa: str, sizes: tuple[int, int], nodes: int) -> None:
    from kt_sglang.unpacking import ROWS, padded

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


@pytest.mark.parametrize("method", FORMATS)
def test_kernels_of_a_card_give_what_plain_torch_gives(method: str) -> None:
    """In Triton's interpreter, in a process of its own: whether to interpret is decided when kernels are defined."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, FORMATS[method]],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "same"]


INTERPRETED = """
import sys, torch
from kt_sglang import unpacking, unpack_kernels
name = sys.argv[1]
shard = unpacking.Shard(name, hidden=320, begin=64, width=64)
packed = torch.randint(0, 256, (2, shard.expert_bytes), dtype=torch.uint8)
for rest in (packed[:, :shard.gate_up_bytes].unflatten(1, (-1, unpacking.block_bytes(name, 320))),
             packed[:, shard.gate_up_bytes:][:, :shard.down_bytes].unflatten(1, (-1, unpacking.block_bytes(name, 64)))):
    inputs = 320 if rest.shape[2] == unpacking.block_bytes(name, 320) else 64
    cut = {"bf16": 32, "int8": 16, "int4": 8}[name] * inputs
    scales = rest[..., cut:]
    powers = {"int8": torch.float32, "int4": torch.bfloat16}.get(name, torch.uint8)  # the interpreter cuts off bits
    if name != "bf16":
        count = scales.shape[2] // powers.itemsize
        scales.copy_(torch.exp2(torch.randint(-9, 3, (*scales.shape[:2], count)).float()).to(powers).view(torch.uint8))
one, other = (
    [torch.zeros(2, 2, 192, 320, dtype=torch.bfloat16), torch.zeros(2, 320, 192, dtype=torch.bfloat16)] for _ in "ab"
)
shard.unpack(packed, *one)
plain = unpacking._IN_TORCH
unpacking._IN_TORCH = {name: lambda blocks, rows: unpack_kernels.unpack(name, blocks, rows)}
shard.unpack(packed, *other)
for a, b in zip(one, other):
    print("same" if a.any() and torch.equal(a.view(torch.int16), b.view(torch.int16)) else "differs")
"""


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "base"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("each", [1, 3, 16])
def test_a_layer_gives_what_kt_kernels_and_float32_give(
    method: str, sizes: tuple[int, int], adapted: bool, each: int
) -> None:
    from kt_model.methods import method_of
    from kt_sglang.streamed import Counts, Streamer

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
    from kt_sglang.streamed import Counts, Streamer

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


@pytest.mark.parametrize("buffers", [2, 3])
def test_the_next_layer_is_brought_ahead_where_all_experts_are_hit(buffers: int) -> None:
    """And what came ahead is used, whatever that layer's router says, or left where another layer is next."""
    from kt_sglang.streamed import Counts, Streamer

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


def test_adapters_of_some_experts_are_found_among_those_of_all() -> None:
    """The pools hold resident experts, too."""
    from kt_sglang.streamed import Streamer

    layer = case("AMXINT8_SFT", 128, 64)
    source = layer.source(adapters=True, in_pools=[0, 1, 3, 4, 6, 8, 9])
    x, ids, scores, slots = batch(8, 128, 7)
    out = Streamer(source, 3, 2, torch.device("cpu")).run(source, x, ids, scores, slots)
    close(out, layer.in_float32(x, ids, scores, slots), 2 * EPS)


def test_other_bytes_than_the_layout_says_are_refused() -> None:
    from kt_sglang.streamed import CannotStream, LayerSource

    with pytest.raises(CannotStream, match=r"layer 3: .* packed bytes, expected"):
        LayerSource.of(3, case("AMXINT8_SFT", 64, 64).moe, "int4")
