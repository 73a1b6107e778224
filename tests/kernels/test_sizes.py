"""What memory is promised to a plan is what the kernels take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from reference import METHODS, build, random_batch, random_layer, random_lora

import kt_kernels


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (96, 80), (100, 200), (64, 40)])
def test_packed_bytes_are_what_a_layer_allocates(method: str, hidden: int, intermediate: int, nodes: int) -> None:
    layer = random_layer(3, hidden, intermediate)
    moe = build(layer, "auto", method, nodes=nodes)
    promised = kt_kernels.packed_bytes(
        method=method, num_experts=3, hidden_size=hidden, intermediate_size=intermediate, nodes=nodes
    )
    assert promised == [shard.nbytes for shard in moe.packed_shards()]
    assert sum(promised) == moe.packed_bytes


@pytest.mark.parametrize("ranks", [(8, 8, 8), (1, 0, 17), (0, 3, 0), (64, 64, 64)])
@pytest.mark.parametrize("experts", [2, 40])
def test_packed_adapter_bytes_are_what_an_adapter_allocates(ranks: tuple[int, int, int], experts: int) -> None:
    layer = random_layer(experts, 100, 72)
    promised = kt_kernels.packed_adapter_bytes(num_experts=experts, hidden_size=100, intermediate_size=72, ranks=ranks)
    assert promised == random_lora(layer, ranks).packed().packed_bytes


def test_methods_have_the_bits_that_their_blocks_take() -> None:
    sizes = {"num_experts": 1, "hidden_size": 1024, "intermediate_size": 1024}
    weights = 3 * 1024 * 1024
    for method, row in kt_kernels.methods().items():
        scales = weights // (row["group"] or 1024) * row["scale_bytes"]
        assert kt_kernels.packed_bytes(method=method, **sizes) == [weights * row["bits"] // 8 + scales], method
    assert list(kt_kernels.methods()) == list(METHODS)


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("tokens", "rank"), [(200, 0), (900, 0), (300, 9)])
def test_scratch_bytes_are_what_a_pool_maps(method: str, tokens: int, rank: int) -> None:
    """The reference takes the most; beside scratch a forward takes a few lists of rows."""
    layer = random_layer(4, 1024, 192)
    if rank:
        layer.adapters[0] = random_lora(layer, rank)
    moe = build(layer, "reference", method, threads=2, nodes=2)
    batch = random_batch(layer, tokens, 2, slots=(0,) if rank else None)
    batch.x.zero_()
    batch.ids[:] = torch.tensor([0, 1])  # both with more rows than a task gathers at once
    out = torch.empty(tokens, 1024)
    before = mapped_bytes()
    moe.forward(batch.x, batch.ids, batch.weights, batch.slots, out)
    grown = mapped_bytes() - before
    promised = kt_kernels.scratch_bytes(
        method=method, num_experts=4, hidden_size=1024, intermediate_size=192, tokens=tokens, top_k=2, threads=2,
        nodes=2, ranks=(rank, rank, rank),
    )  # fmt: skip
    assert promised <= grown <= promised + (2 << 20)


def test_scratch_is_bounded_however_long_a_batch_is() -> None:
    def bytes_of(tokens: int) -> int:
        return kt_kernels.scratch_bytes(
            method="AMXBF16_SFT", num_experts=64, hidden_size=2048, intermediate_size=1408, tokens=tokens, top_k=6,
            threads=16,
        )  # fmt: skip

    assert bytes_of(1000) < bytes_of(4096) < bytes_of(100_000) == bytes_of(1_000_000)
    assert bytes_of(1_000_000) < 700 << 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "FP8"}, "method: 'FP8' is not known, expected AMXBF16_SFT, AMXINT8_SFT or AMXINT4_SFT"),
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"nodes": 0}, "nodes: expected at least 1, got 0"),
    ],
)
def test_sizes_that_no_layer_has_are_refused(changes: dict[str, object], message: str) -> None:
    sizes = {"method": "AMXBF16_SFT", "num_experts": 1, "hidden_size": 8, "intermediate_size": 8, "nodes": 1}
    with pytest.raises(ValueError, match=message):
        kt_kernels.packed_bytes(**(sizes | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [-1, 2**30 + 1])
def test_ranks_that_no_adapter_has_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"ranks: expected 0 to 1073741824, got {rank}"):
        kt_kernels.scratch_bytes(
            method="AMXBF16_SFT", num_experts=1, hidden_size=8, intermediate_size=8, tokens=1, top_k=1, threads=1,
            ranks=(0, 0, rank),
        )  # fmt: skip
