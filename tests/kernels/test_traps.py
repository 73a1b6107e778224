"""One test for each trap that others' kernels fell into; the name says which. Wider sweeps are in the other files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import Batch, build, check, forward, random_batch, random_layer, random_lora, relative_l2

import kt_kernels


def test_adapter_is_not_lost_on_its_way_into_forward(isa: str) -> None:
    layer = random_layer(2, 64, 48)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, isa)
    batch = random_batch(layer, 4, 2, slots=(0,))
    base = forward(moe, Batch(batch.x, batch.ids, batch.weights))
    assert relative_l2(forward(moe, batch), base) > 0.3


@pytest.mark.parametrize(("rank", "scale"), [(4, 0.25), (8, 2.0), (8, 16.0), (16, 0.0)])
def test_rank_and_scale_never_fall_back_to_defaults(isa: str, rank: int, scale: float) -> None:
    layer = random_layer(2, 64, 48)
    lora = random_lora(layer, rank, scale=1.0)
    layer.adapters[0] = type(lora)(lora.gate, lora.up, lora.down, scale)
    check(layer, build(layer, isa), random_batch(layer, 3, 2, slots=(0,)))


def test_gate_and_up_have_scratch_of_their_own(isa: str, method: str) -> None:
    """First call wrong, second right: the first call must already be right, and equal to the second."""
    layer = random_layer(4, 128, 96)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 20, 3, slots=(-1, 0))
    assert torch.equal(check(layer, moe, batch, "first call"), forward(moe, batch))


@pytest.mark.parametrize("nodes", [2, 3])
def test_shards_cut_base_and_adapters_alike(isa: str, nodes: int) -> None:
    layer = random_layer(2, 64, 192)
    layer.adapters[0] = random_lora(layer, 8)
    check(layer, build(layer, isa, nodes=nodes), random_batch(layer, 5, 2, slots=(0,)))


def test_scratch_never_overlaps_what_lasts(isa: str) -> None:
    """A large forward must leave weights and adapters as they were."""
    layer = random_layer(4, 96, 80)
    layer.adapters[0] = random_lora(layer, 17)
    moe = build(layer, isa)
    small = random_batch(layer, 3, 2, slots=(0,))
    before = forward(moe, small)
    forward(moe, random_batch(layer, 300, 4, slots=(-1, 0), seed=5))
    assert torch.equal(forward(moe, small), before)


@pytest.mark.parametrize("tokens", [(300, 1), (1, 300, 1), (64, 2, 65)])
def test_large_batch_then_one_token(isa: str, method: str, tokens: tuple[int, ...]) -> None:
    layer = random_layer(3, 64, 48)
    moe = build(layer, isa, method)
    for count in tokens:
        check(layer, moe, random_batch(layer, count, 2, seed=count), f"{count} tokens")


def test_scratch_follows_the_batch_not_the_worst_case() -> None:
    """256 experts that each might get all 512 tokens would need 3 GB; 64 MiB are enough for what is really routed."""
    code = """
import resource, torch, kt_kernels
moe = kt_kernels.MoE(num_experts=256, hidden_size=1024, intermediate_size=64, pool=kt_kernels.ThreadPool(2))
one = [torch.zeros(64, 1024).bfloat16(), torch.zeros(64, 1024).bfloat16(), torch.zeros(1024, 64).bfloat16()]
for expert in range(256):
    moe.load_expert(expert, *one)
ids = torch.randint(256, (512, 8))
x, out = torch.zeros(512, 1024).bfloat16(), torch.empty(512, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moe.forward(x, ids, torch.ones(512, 8), None, out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    folder = str(Path(kt_kernels.__file__).resolve().parent.parent)
    grown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{code}"], capture_output=True, text=True
    )
    assert grown.returncode == 0, grown.stderr
    assert int(grown.stdout) < 80, "MiB"


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 4160), (4160, 64)])
def test_every_block_is_packed(isa: str, method: str, hidden: int, intermediate: int) -> None:
    """Not the first block only: more blocks than any task or panel takes at once."""
    layer = random_layer(1, hidden, intermediate)
    layer.adapters[0] = random_lora(layer, 8)
    check(layer, build(layer, isa, method), random_batch(layer, 6, 1, slots=(0,)))


def test_rank_below_every_step_is_padded_with_zeros(isa: str) -> None:
    """After a batch of rank 64 has left its values in scratch, ranks 1 to 7 must not meet them."""
    layer = random_layer(2, 64, 96)
    layer.adapters[0] = random_lora(layer, 64, scale=100.0)
    for rank in range(1, 8):
        layer.adapters[rank] = random_lora(layer, rank, seed=rank)
    moe = build(layer, isa)
    for rank in range(1, 8):
        forward(moe, random_batch(layer, 24, 2, slots=(0,)))
        check(layer, moe, random_batch(layer, 24, 2, slots=(rank,)), f"rank {rank}")
    check(layer, moe, random_batch(layer, 40, 2, slots=tuple(range(8))), "all ranks at once")


def test_scratch_garbage_is_never_read(isa: str, method: str) -> None:
    """A forward full of NaN leaves NaN everywhere in scratch; the next one must not see it."""
    layer = random_layer(3, 70, 50)
    layer.adapters[0] = random_lora(layer, 5)
    moe = build(layer, isa, method)
    poison = random_batch(layer, 64, 3, slots=(0,))
    poison.x.fill_(float("nan"))
    assert not torch.isfinite(forward(moe, poison)).any()
    for tokens in (1, 5, 33):
        check(layer, moe, random_batch(layer, tokens, 2, slots=(-1, 0), seed=tokens), f"{tokens} tokens after NaN")


@pytest.mark.parametrize("hidden", [1, 31, 63, 65, 127, 1023, 1025])
def test_activation_quantizer_stays_inside_its_row(isa: str, hidden: int) -> None:
    """x ends where its memory ends: the last row's neighbour is NaN, and reading it would show."""
    layer = random_layer(1, hidden, 32)
    moe = build(layer, isa, "AMXINT8_SFT")
    memory = torch.full((4 * hidden + 64,), float("nan")).bfloat16()
    batch = random_batch(layer, 4, 1)
    memory[: 4 * hidden] = batch.x.flatten()
    batch.x = memory[: 4 * hidden].view(4, hidden)
    check(layer, moe, batch)


def test_offsets_beyond_32_bits() -> None:
    """Rows of x beyond 2^31 values are found: tokens x hidden of a long prefill goes there."""
    hidden, tokens = 8, 3
    layer = random_layer(1, hidden, 8)
    moe = build(layer, "auto")
    stride = 2**30 + 8  # bf16 values: the third row starts 4 GiB behind the first
    memory = torch.empty(2 * stride + hidden, dtype=torch.bfloat16)
    x = memory.as_strided((tokens, hidden), (stride, 1))
    batch = random_batch(layer, tokens, 1)
    x.copy_(batch.x)
    out = torch.empty(tokens, hidden)
    moe.forward(x, batch.ids, batch.weights, None, out)
    assert torch.equal(out, forward(moe, batch))


def test_output_type_is_the_outs_own(isa: str) -> None:
    layer = random_layer(2, 64, 48)
    moe = build(layer, isa)
    batch = random_batch(layer, 5, 2)
    exact = forward(moe, batch)
    rounded = forward(moe, batch, torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_a_replaced_adapter_lives_as_long_as_a_forward_needs_it() -> None:
    """Nothing else holds the adapter: set_adapter(None) right after a forward began must not pull it away."""
    layer = random_layer(2, 256, 256)
    moe = build(layer, "auto")
    for turn in range(50):
        moe.set_adapter(0, random_lora(layer, 8, seed=turn).packed())
        moe.set_adapter(0, None)
    layer.adapters[0] = random_lora(layer, 8)
    moe.set_adapter(0, layer.adapters[0].packed())
    check(layer, moe, random_batch(layer, 4, 2, slots=(0,)))


def test_non_contiguous_adapters_are_refused_not_misread() -> None:
    layer = random_layer(2, 64, 48)
    gate_a, gate_b = random_lora(layer, 8).gate or (None, None)
    assert gate_a is not None
    with pytest.raises(ValueError, match="gate_a: expected contiguous values"):
        kt_kernels.Adapter(gate_a.transpose(1, 2).contiguous().transpose(1, 2), gate_b, None, None, None, None)
