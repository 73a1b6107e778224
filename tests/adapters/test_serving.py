"""What SGLang is given has one rank, one scale and whole fused groups, and is still exactly the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError
from kt_model.importer import Imported, import_adapter
from kt_model.importer.serving import (
    PREFIX,
    Tensor,
    config_for_sglang,
    require_served,
    tensors_for_sglang,
    unserved_parts,
    without,
)
from kt_model.tensors.stored import Stored, round_to_bfloat16

FIXTURES = Path(__file__).resolve().parent / "fixtures"
BaseOf = Callable[[Path], Checkpoint]


def values(tensor: Tensor) -> npt.NDArray[np.float32]:
    return Stored(tensor.array, tensor.dtype).float32()


def given(imported: Imported, base: Checkpoint) -> dict[str, npt.NDArray[np.float32]]:
    return {tensor.name: values(tensor) for tensor in tensors_for_sglang(imported, base)}


def deltas(
    imported: Imported, tensors: dict[str, npt.NDArray[np.float32]]
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """ΔW as SGLang computes it from what it is given, and as the adapter means it."""
    config = config_for_sglang(imported)
    scale = float(config["lora_alpha"]) / int(config["r"])  # type: ignore[arg-type, call-overload]
    for pair in imported.pairs.values():
        target = pair.target
        if target.kind == "routed_experts":
            name = f"{PREFIX}layers.{target.layer}.mlp.experts.{target.projection}_proj"
            a, b = tensors[f"{name}.lora_A.weight"][target.expert], tensors[f"{name}.lora_B.weight"][target.expert]
        else:
            name = f"{PREFIX}{target.module}"
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        yield scale * (b @ a), pair.delta()


@pytest.mark.parametrize(
    "name",
    ["a_patterns", "a_rslora_patterns", "a_everything", "a_bfloat16", "b_rslora_patterns", "c_rslora", "kt_training"],
)
def test_sglang_computes_the_adapters_own_delta(name: str, base_of: BaseOf) -> None:
    base = base_of(FIXTURES / name)
    imported = import_adapter(FIXTURES / name, base)
    for found, expected in deltas(imported, given(imported, base)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["a_bfloat16", "kt_training"])
def test_a_scale_of_zero_gives_zeros(name: str, base_of: BaseOf) -> None:
    base = base_of(FIXTURES / name)
    imported = import_adapter(FIXTURES / name, base)
    nothing = replace(imported, pairs={key: replace(pair, scale=0.0) for key, pair in imported.pairs.items()})
    for found, expected in deltas(nothing, given(nothing, base)):
        assert not found.any()
        assert not expected.any()


def test_a_scale_of_zero_is_warned_of(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "a_down_only" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    shutil.copy(FIXTURES / "a_down_only" / "adapter_model.safetensors", tmp_path)
    assert import_adapter(tmp_path).warnings == ("lora_alpha is zero: the adapter does nothing",)


def test_all_tensors_have_the_one_rank_that_is_announced(base_of: BaseOf) -> None:
    base = base_of(FIXTURES / "a_patterns")
    imported = import_adapter(FIXTURES / "a_patterns", base)
    assert config_for_sglang(imported)["r"] == 5
    for name, tensor in given(imported, base).items():
        assert tensor.shape[-2 if "lora_A" in name else -1] == 5


def test_bits_of_a_bfloat16_adapter_go_on_unchanged(base_of: BaseOf) -> None:
    base = base_of(FIXTURES / "a_bfloat16")
    imported = import_adapter(FIXTURES / "a_bfloat16", base)
    assert {tensor.dtype for tensor in tensors_for_sglang(imported, base)} == {"BF16"}


def test_absent_members_of_fused_groups_are_zero(base_of: BaseOf) -> None:
    base = base_of(FIXTURES / "a_all_linear")
    imported = import_adapter(FIXTURES / "a_all_linear", base)
    kept = {name: pair for name, pair in imported.pairs.items() if not name.endswith((".k_proj", ".v_proj", ".up"))}
    cut = Imported(imported.path, "A", kept)
    tensors = given(cut, base)
    for absent in ("self_attn.k_proj", "self_attn.v_proj"):
        assert tensors[f"{PREFIX}layers.0.{absent}.lora_A.weight"].shape == (2, 64)
        assert not tensors[f"{PREFIX}layers.0.{absent}.lora_B.weight"].any()
    assert not tensors[f"{PREFIX}layers.0.mlp.experts.up_proj.lora_B.weight"].any()


def test_experts_are_targets_as_a_whole(base_of: BaseOf) -> None:
    imported = import_adapter(FIXTURES / "a_down_only", base_of(FIXTURES / "a_down_only"))
    assert config_for_sglang(imported)["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


def test_routers_are_named_and_refused_unless_ignored(base_of: BaseOf) -> None:
    base = base_of(FIXTURES / "a_all_linear")
    imported = import_adapter(FIXTURES / "a_all_linear", base)
    assert unserved_parts(imported, base).keys() == {"router", "shared_expert_gate"}
    with pytest.raises(LaunchError, match=r"router \(SGLang has no LoRA on routers\).*lora.ignore=\[router,shared_exp"):
        require_served(imported, base, [], "lora.path")
    require_served(imported, base, ["router", "shared_expert_gate"], "lora.path")
    rest = without(imported, ["router", "shared_expert_gate"])
    assert len(rest.pairs) == len(imported.pairs) - 4


def test_a_part_that_is_none_cannot_be_ignored() -> None:
    imported = import_adapter(FIXTURES / "a_down_only")
    with pytest.raises(LaunchError, match=r"lora\.ignore: no part named routers\. Choose from attention, "):
        require_served(imported, None, ["routers"], "lora.path")


def test_whole_kinds_can_be_left_out() -> None:
    imported = without(import_adapter(FIXTURES / "a_everything"), ["attention", "dense_mlp"])
    assert {pair.target.kind for pair in imported.pairs.values()} == {"routed_experts", "shared_experts"}


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=1000).astype(np.float32)
    import torch

    expected = torch.from_numpy(numbers).to(torch.bfloat16).float().numpy()
    assert np.array_equal(Stored(round_to_bfloat16(numbers), "BF16").float32(), expected)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -0.0, np.nan], np.float32)
    rounded = Stored(round_to_bfloat16(ties), "BF16").float32()
    np.testing.assert_array_equal(rounded, np.array([1, 1 + 2**-6, np.inf, 0, np.nan], np.float32))


@pytest.mark.parametrize("rows", [1, 5])
def test_kv_b_in_absorbed_attention_equals_the_merged_weight(rows: int) -> None:
    """q·(W+ΔW)_k and latent·(W+ΔW)_v against the corrections, for two adapters and bare rows in one batch."""
    import torch

    from kt_sglang.without_gpu.mla_adapters import around_apply_q_correction, around_apply_v_correction

    heads, nope, value, latent, rank, slots = 3, 8, 4, 16, 2, 3
    torch.manual_seed(0)
    a, b = torch.randn(slots, rank, latent), torch.randn(slots, heads * (nope + value), rank)
    batch = SimpleNamespace(
        weight_indices_cpu=torch.tensor([1, 0, 2]),
        seg_lens_cpu=torch.tensor([rows, 2, 3]),
        lora_ranks_cpu=torch.tensor([0, rank, rank]),
        scalings_cpu=torch.tensor([0.0, 0.5, 2.0]),
    )
    layer = SimpleNamespace(A_buffer=a, B_buffer=b, lora_backend=SimpleNamespace(batch_info=batch))
    attention = SimpleNamespace(kv_b_proj=layer, qk_nope_head_dim=nope, v_head_dim=value, num_local_heads=heads)
    tokens = rows + 5
    q, z = torch.randn(tokens, heads, nope), torch.randn(tokens, heads, latent)
    slot_of = [1] * rows + [0] * 2 + [2] * 3
    scale = {0: 0.0, 1: 0.5, 2: 2.0}
    expected_q, expected_v = torch.zeros(tokens, heads, latent), torch.zeros(tokens, heads, value)
    for token, slot in enumerate(slot_of):
        delta = (scale[slot] * b[slot] @ a[slot]).view(heads, nope + value, latent)
        expected_q[token] = torch.einsum("nk,nkc->nc", q[token], delta[:, :nope])
        expected_v[token] = torch.einsum("nc,nvc->nv", z[token], delta[:, nope:])
    out_q, out_v = torch.randn(tokens, heads, latent), torch.randn(tokens, heads * value)
    before_q, before_v = out_q.clone(), out_v.clone()
    found_q = around_apply_q_correction(lambda: None, attention, q, out_q)
    found_v = around_apply_v_correction(lambda: None, attention, z, out_v)
    torch.testing.assert_close(found_q - before_q, expected_q, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found_v - before_v, expected_v.flatten(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(out_q, before_q)
    assert torch.equal(out_v, before_v)
