"""What memory is promised to a plan is what the kernels take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from reference import METHODS, build, random_layer, random_lora

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


SCRATCH = """
import sys
import torch
import kt_kernels

method, tokens, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
experts, hidden, intermediate, top_k = 4, 1024, 192, 2
sizes = dict(num_experts=experts, hidden_size=hidden, intermediate_size=intermediate)
moe = kt_kernels.MoE(**sizes, method=method, isa="reference", pool=kt_kernels.ThreadPool(2, nodes=2))
weights = [torch.zeros(intermediate, hidden), torch.zeros(intermediate, hidden), torch.zeros(hidden, intermediate)]
for expert in range(experts):
    moe.load_expert(expert, *(weight.bfloat16() for weight in weights))
slots = None
if rank:
    a, b = torch.zeros(experts, rank, hidden).bfloat16(), torch.zeros(experts, intermediate, rank).bfloat16()
    down = torch.zeros(experts, rank, intermediate).bfloat16(), torch.zeros(experts, hidden, rank).bfloat16()
    moe.set_adapter(0, kt_kernels.Adapter(a, b, a, b, *down))
    slots = torch.zeros(tokens, dtype=torch.int64)
x, out = torch.zeros(tokens, hidden).bfloat16(), torch.empty(tokens, hidden)
ids = torch.ones(tokens, top_k, dtype=torch.int64)
ids[:, 0] = 0  # both with more rows than a task gathers at once
shares = torch.ones(tokens, top_k)

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

before = mapped()
moe.forward(x, ids, shares, slots, out)
promised = kt_kernels.scratch_bytes(
    method=method, **sizes, tokens=tokens, top_k=top_k, threads=2, nodes=2, ranks=(rank, rank, rank)
)
print(mapped() - before, promised)
"""


@pytest.mark.parametrize(("tokens", "rank"), [(200, 0), (3000, 0), (700, 9)])
def test_scratch_bytes_are_what_a_pool_maps(method: str, tokens: int, rank: int) -> None:
    """Each in a process of its own; beside scratch a forward takes a few lists of rows."""
    folder = str(Path(kt_kernels.__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {folder!r})\n{SCRATCH}"
    done = subprocess.run(
        [sys.executable, "-c", code, method, str(tokens), str(rank)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown, promised = map(int, done.stdout.split())
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
