"""The traps that others' kernels fell into, each with the tests of ours that would find us in it: the table TRAPS.

Tests that exist for a trap alone are here; wider sweeps, which the table names too, are in the other files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from reference import Batch, build, check, forward, random_batch, random_layer, random_lora, relative_l2

import kt_kernels

ROOT = Path(__file__).resolve().parents[2]
KERNELS, PLUGIN, ADAPTERS, SERVER = "tests/kernels/", "tests/plugin/", "tests/adapters/", "tests/server/"
TRAPS: dict[str, tuple[str, ...]] = {
    "config object copied by value loses the adapter pointers": (
        KERNELS + "test_traps.py::test_adapter_is_not_lost_on_its_way_into_forward",
        SERVER + "test_demo.py::test_bug_8_silent_no_op_adapter_is_impossible",
    ),
    "rank and alpha fall back to defaults": (
        KERNELS + "test_traps.py::test_rank_and_scale_never_fall_back_to_defaults",
        ADAPTERS + "test_expected_deltas.py::test_ranks_and_scales_are_the_modules_own",
    ),
    "gate and up tasks share one scratch buffer": (
        KERNELS + "test_traps.py::test_gate_and_up_have_scratch_of_their_own",
    ),
    "tensor-parallel slices of base or of LoRA not cut": (
        KERNELS + "test_traps.py::test_shards_cut_base_and_adapters_alike",
        KERNELS + "test_product.py::test_every_pair_of_rows_and_rank",
        PLUGIN + "test_batch.py::test_tensor_parallel_parts_add_up_to_the_whole",
    ),
    "slices are copies, an adapter swapped in place is not seen": (
        KERNELS + "test_lora.py::test_an_updated_slot_is_seen_at_once",
        KERNELS + "test_traps.py::test_every_shard_sees_a_swapped_adapter",
    ),
    "scratch pool overlaps persistent buffers": (
        KERNELS + "test_traps.py::test_scratch_never_overlaps_what_lasts",
        KERNELS + "test_traps.py::test_scratch_garbage_is_never_read",
    ),
    "worst-case per-expert buffers": (KERNELS + "test_traps.py::test_scratch_follows_the_batch_not_the_worst_case",),
    "pack or unpack handles the first N block only": (KERNELS + "test_traps.py::test_every_block_is_packed",),
    "tiled accumulator read as row-major": (
        KERNELS + "test_traps.py::test_each_output_column_is_its_own",
        KERNELS + "test_product.py::test_every_pair_of_rows_and_rank",
    ),
    "rank below the K step without zero padding": (
        KERNELS + "test_traps.py::test_rank_below_every_step_is_padded_with_zeros",
        KERNELS + "test_traps.py::test_scratch_garbage_is_never_read",
    ),
    "exp polynomial evaluated in the wrong order": (KERNELS + "test_moe.py::test_silu_is_exact_over_its_whole_range",),
    "activation quantizer strides past the end": (
        KERNELS + "test_traps.py::test_activation_quantizer_stays_inside_its_row",
    ),
    "int32 overflow of tokens x top-k x hidden": (
        KERNELS + "test_traps.py::test_offsets_beyond_32_bits",
        KERNELS + "test_traps.py::test_experts_beyond_4_gib",
        KERNELS + "test_moe.py::test_long_prefill_in_chunks_is_the_same_as_token_by_token",
    ),
    "prepared flag stale after an adapter update": (
        KERNELS + "test_lora.py::test_an_updated_slot_is_seen_at_once",
        PLUGIN + "test_seams.py::test_lora_manager_tells_layers_about_changed_slots",
    ),
    "output buffer dtype float vs bf16": (
        KERNELS + "test_traps.py::test_output_type_is_the_outs_own",
        PLUGIN + "test_batch.py::test_bug_6_the_result_has_the_callers_dtype_and_device",
    ),
    "GPU to CPU copy not ordered before the CPU reads": (
        PLUGIN + "test_traps.py::test_copies_from_a_device_are_waited_for",
        PLUGIN + "test_traps.py::test_a_batch_that_the_device_still_computes_arrives_whole",
    ),
    "topk_ids or hidden_states changed in place": (
        KERNELS + "test_bindings.py::test_inputs_are_never_changed",
        KERNELS + "test_hostile.py::test_out_over_any_input_is_refused",
        PLUGIN + "test_batch.py::test_bug_7_gathering_a_batch_changes_no_input",
    ),
    "task holds a raw pointer to a replaced buffer": (
        KERNELS + "test_traps.py::test_a_replaced_adapter_lives_as_long_as_a_forward_needs_it",
        KERNELS + "test_lora.py::test_swap_while_forwards_run",
    ),
    "LoRA tensors on the CUDA default device, wrong dtype, not contiguous": (
        KERNELS + "test_traps.py::test_non_contiguous_adapters_are_refused_not_misread",
        KERNELS + "test_hostile.py::test_adapters_that_cannot_be_read_are_refused",
        KERNELS + "test_bindings.py::test_adapter_refuses",
        PLUGIN + "test_traps.py::test_adapters_are_packed_on_the_host_whatever_the_default_device_and_dtype",
    ),
    "LoRA on MLA's absorbed kv_b_proj skipped": (
        ADAPTERS + "test_serving.py::test_kv_b_in_absorbed_attention_equals_the_merged_weight",
        ADAPTERS + "test_served.py::test_served_adapters_are_the_merged_checkpoints",
    ),
}
# What every adapter kernel must be tried with at least, and where it is.
LEAST: dict[str, tuple[str, ...]] = {
    "delta against base well above zero": (KERNELS + "test_lora.py::test_every_rank",),
    "true base from an absent adapter": (KERNELS + "test_lora.py::test_the_base_is_the_true_base",),
    "rank 1, 8, 16, 64": (KERNELS + "test_product.py::test_every_pair_of_rows_and_rank",),
    "intermediate above and not a multiple of every block": (KERNELS + "test_traps.py::test_every_block_is_packed",),
    "two pools": (KERNELS + "test_lora.py::test_adapters_over_pools",),
    "two batch sizes in sequence, large then 1": (KERNELS + "test_traps.py::test_large_batch_then_one_token",),
    "adapter swap while serving": (KERNELS + "test_lora.py::test_swap_while_forwards_run",),
    "two adapters and base mixed in one batch": (KERNELS + "test_lora.py::test_two_adapters_and_base_in_one_batch",),
}


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("trap", [*TRAPS, *LEAST])
def test_every_trap_has_its_tests(trap: str) -> None:
    for test in (TRAPS | LEAST)[trap]:
        path, name = test.split("::")
        assert name in functions_of(path), f"{test} is gone: who finds us in this trap now?"


def test_every_test_of_this_file_is_for_a_trap() -> None:
    here = "tests/kernels/test_traps.py"
    named = {test.split("::")[1] for tests in (*TRAPS.values(), *LEAST.values()) for test in tests if here in test}
    others = {name for name in functions_of(here) if name.startswith("test_")} - named
    assert others == {"test_every_trap_has_its_tests", "test_every_test_of_this_file_is_for_a_trap"}


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
import re, torch, kt_kernels
def peak_kib():  # of this program alone: ru_maxrss also knows the process that it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
moe = kt_kernels.MoE(num_experts=256, hidden_size=1024, intermediate_size=64, pool=kt_kernels.ThreadPool(2))
one = [torch.zeros(64, 1024).bfloat16(), torch.zeros(64, 1024).bfloat16(), torch.zeros(1024, 64).bfloat16()]
for expert in range(256):
    moe.load_expert(expert, *one)
ids = torch.randint(256, (512, 8))
x, out = torch.zeros(512, 1024).bfloat16(), torch.empty(512, 1024)
before = peak_kib()
moe.forward(x, ids, torch.ones(512, 8), None, out)
print((peak_kib() - before) // 1024)
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
    """Rows beyond 2^31 values are found and written: tokens x hidden of a long prefill goes there."""
    hidden, tokens = 8, 3
    layer = random_layer(1, hidden, 8)
    moe = build(layer, "auto")
    stride = 2**30 + 8  # bf16 values: the third row starts 4 GiB behind the first
    x, out = (
        torch.empty(2 * stride + hidden, dtype=torch.bfloat16).as_strided((tokens, hidden), (stride, 1)) for _ in "xo"
    )
    batch = random_batch(layer, tokens, 1)
    x.copy_(batch.x)
    moe.forward(x, batch.ids, batch.weights, None, out)
    assert torch.equal(out, forward(moe, batch, torch.bfloat16))


@pytest.mark.parametrize(
    "method",
    ["AMXBF16_SFT", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("AMXINT8_SFT", "AMXINT4_SFT"))],
)
def test_experts_beyond_4_gib(method: str) -> None:
    """Of a layer with very many experts only the last ones are loaded; the memory of all of them is there, 4 GiB, which
    takes ten seconds. Where an expert lies is computed alike for all methods."""
    last = random_layer(2, 256, 64)
    each = build(last, "auto", method).packed_bytes // 2
    experts = 2**32 // each + 3
    pool = kt_kernels.ThreadPool(2)
    moe = kt_kernels.MoE(num_experts=experts, hidden_size=256, intermediate_size=64, method=method, pool=pool)
    assert moe.packed_bytes > 2**32
    for number in range(2):
        moe.load_expert(experts - 2 + number, *last.matrices(number))
    batch = random_batch(last, 5, 2)
    expected = forward(build(last, "auto", method), batch)
    batch.ids += experts - 2
    assert torch.equal(forward(moe, batch), expected)


def test_each_output_column_is_its_own(isa: str, method: str) -> None:
    """Weights that pick one input for one output: a tile read in another order shows as a column that moved.

    Gate and up in each other's place show as silu(-x).
    """
    size = 48
    layer = random_layer(1, size, size)
    layer.gate.copy_(8 * torch.eye(size)), layer.up.copy_(-torch.eye(size)), layer.down.copy_(torch.eye(size))
    column = torch.arange(size)
    for rows in (1, 5, 16, 33):
        batch = random_batch(layer, rows, 1)
        batch.x = (1 + (column * 5 + torch.arange(rows)[:, None] * 7) % 11).bfloat16()  # near ties are 9 % apart
        batch.weights.fill_(1.0)
        out = forward(build(layer, isa, method), batch)
        x = batch.x.double()
        assert ((out + 8 * x * x).abs() < 0.04 * 8 * 121).all(), f"{rows} rows"
        assert relative_l2(out, -8 * x * x) < 0.02


def test_output_type_is_the_outs_own(isa: str) -> None:
    layer = random_layer(2, 64, 48)
    moe = build(layer, isa)
    batch = random_batch(layer, 5, 2)
    exact = forward(moe, batch)
    rounded = forward(moe, batch, torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())


def test_a_replaced_adapter_lives_as_long_as_a_forward_needs_it() -> None:
    """Nothing else holds the adapter: taking it out of its slot while a forward runs must not pull it away."""
    layer = random_layer(8, 512, 512)
    layer.adapters[0] = random_lora(layer, 16)
    moe = build(layer, "reference", threads=1)  # slow enough to be overtaken
    batch = random_batch(layer, 64, 8, slots=(0,))
    expected = forward(moe, batch)
    overtaken = 0
    for turn in range(3):
        moe.set_adapter(0, layer.adapters[0].packed())
        found: list[torch.Tensor] = []
        runner = threading.Thread(target=lambda found=found: found.append(forward(moe, batch)))
        runner.start()
        threading.Event().wait(0.01)
        moe.set_adapter(0, None)
        overtaken += runner.is_alive()
        reused = [random_lora(layer, 16, seed=90 + turn).packed() for _ in range(2)]  # where the old one was, if freed
        runner.join()
        assert len(reused) == 2 and torch.equal(found[0], expected), f"turn {turn}"
    assert overtaken, "no forward was in flight when its adapter was taken away"


def test_every_shard_sees_a_swapped_adapter(method: str) -> None:
    layer = random_layer(2, 72, 330)
    layer.adapters[0] = random_lora(layer, 8)
    moe = build(layer, "auto", method, threads=3, nodes=3)
    batch = random_batch(layer, 7, 2, slots=(0,))
    check(layer, moe, batch, "before")
    for rank in (8, 20, 3):
        layer.adapters[0] = random_lora(layer, rank, seed=rank + 1)
        moe.set_adapter(0, layer.adapters[0].packed())
        check(layer, moe, batch, f"rank {rank}")


def test_non_contiguous_adapters_are_refused_not_misread() -> None:
    layer = random_layer(2, 64, 48)
    gate_a, gate_b = random_lora(layer, 8).gate or (None, None)
    assert gate_a is not None
    with pytest.raises(ValueError, match="gate_a: expected contiguous values"):
        kt_kernels.Adapter(gate_a.transpose(1, 2).contiguous().transpose(1, 2), gate_b, None, None, None, None)
