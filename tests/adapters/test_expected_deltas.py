"""ΔW of every module equals what PEFT's own merge_and_unload gave: format × PEFT version × family, and the options.

The bound is float32 rounding: PEFT multiplies in float32, the importer in float64, so an entry may differ by the
rounding of a sum of r products, some eps · r · |a|·|b|·scale; TOLERANCE allows 8 eps of ΔW's largest entry.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from make_fixtures import BASES, EXPERTS, KT_CASES, PEFT_VERSIONS, cases, converted_families, sample_places
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint as write_model
from tiny_files import write_adapter

from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.importer import Imported, Pair, import_adapter

WEIGHTS = "adapter_model.safetensors"
FIXTURES = Path(__file__).resolve().parent / "fixtures"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
TOLERANCE = 8 * float(np.finfo(np.float32).eps)


def expected_name(pair: Pair) -> str:
    target = pair.target
    expert = f"{target.layer}.{target.expert}.{target.projection}"
    return expert if target.kind == "routed_experts" else f"model.{target.module}"


def file_keys(folder: Path) -> list[str]:
    keys = []
    for file in folder.glob("*.safetensors"):
        if file.name != "expected.safetensors":
            with safe_open(str(file), "np") as opened:
                keys += list(opened.keys())
    return keys


@pytest.mark.parametrize("name", NAMES)
def test_every_delta_is_pefts(name: str, base_of: Callable[[Path], Checkpoint]) -> None:
    folder = FIXTURES / name
    imported = import_adapter(folder, base_of(folder)).require_sound()
    found = {expected_name(pair): pair for pair in imported.pairs.values()}
    with safe_open(str(folder / "expected.safetensors"), "np") as opened:
        facts, samples = json.loads(opened.metadata()["facts"]), opened.get_tensor("samples")
    assert found.keys() == facts.keys()
    for sample, module in zip(samples, sorted(facts), strict=True):
        *shape, norm = facts[module]
        delta = found[module].delta()
        assert list(delta.shape) == shape
        error = np.abs(delta.ravel()[sample_places(module, delta.size)] - sample).max()
        assert error <= TOLERANCE * np.abs(delta).max(), f"{module}: {error}"
        assert found[module].norm() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_counted_once(name: str) -> None:
    imported = import_adapter(FIXTURES / name)
    assert sum(imported.keys.values()) == len(file_keys(FIXTURES / name))
    assert not imported.refused


@pytest.mark.parametrize("name", NAMES)
def test_without_a_base_the_same_is_read(name: str, base_of: Callable[[Path], Checkpoint]) -> None:
    folder = FIXTURES / name
    with_base, without = import_adapter(folder, base_of(folder)), import_adapter(folder).require_sound()
    assert without.pairs.keys() == with_base.pairs.keys()
    for module, pair in without.pairs.items():
        assert np.array_equal(pair.delta(), with_base.pairs[module].delta())


def test_the_fixtures_cover_formats_versions_and_families() -> None:
    table = cases()
    assert {*table, *KT_CASES} == set(NAMES)
    assert set(KT_CASES.values()) == set(BASES)
    for family in ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe"):
        for version in PEFT_VERSIONS:
            short = version.replace(".", "")
            assert table[f"a_{family}_{short}"][1] == table[f"b_{family}_{short}"][1] == version
            if family in converted_families(version):
                assert table[f"c_{family}_{short}"][1] == version


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_told_apart(name: str) -> None:
    expected = "D" if name in KT_CASES else name[0].upper()
    assert import_adapter(FIXTURES / name).format == expected


def test_stacked_factors_are_the_delta_with_absent_experts_and_lower_ranks_as_zero() -> None:
    imported = import_adapter(FIXTURES / "a_patterns")
    stacked = imported.stacked(1, "gate", EXPERTS + 1, rank=8)
    assert stacked is not None
    a, b = stacked
    assert a.shape[:2] == (EXPERTS + 1, 8)
    for expert in range(EXPERTS):
        expected = imported.pairs[f"layers.1.experts.{expert}.gate"].delta()
        np.testing.assert_allclose(b[expert] @ a[expert], expected, rtol=0, atol=1e-6)
    assert not a[EXPERTS].any()
    assert not b[EXPERTS].any()
    assert imported.stacked(7, "gate", EXPERTS) is None


def test_ranks_and_scales_are_the_modules_own() -> None:
    pairs = import_adapter(FIXTURES / "a_patterns").pairs
    assert pairs["layers.1.experts.2.gate"].rank == 5
    assert pairs["layers.1.experts.2.gate"].scale == 6 / 5
    assert pairs["layers.0.experts.0.down"].rank == 3
    assert pairs["layers.0.experts.0.down"].scale == 9 / 3
    assert pairs["layers.0.experts.0.up"].scale == 1 / 2


def test_rank_stabilized_scale_divides_by_the_root_of_the_modules_own_rank() -> None:
    pairs = import_adapter(FIXTURES / "a_rslora_patterns").pairs
    assert pairs["layers.1.experts.0.down"].scale == pytest.approx(6 / 4**0.5)
    assert pairs["layers.1.experts.0.gate"].scale == pytest.approx(3 / 2**0.5)


PATTERNS = ("model.embed_tokens", r"^model\.language_model\.layers\.1\.self_attn\.q_proj", "lm_head")


@pytest.mark.parametrize("start", ["base_model.model.", "base_model.model.base_model.model.", "pretrained_model."])
def test_patterns_are_matched_with_the_name_that_peft_had(start: str, tmp_path: Path) -> None:
    """Of embeddings and of models that are part of a larger one, too: another alpha would be a wrong scale in
    silence."""
    from peft.utils.other import get_pattern_key

    layers = ("model.language_model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.k_proj")
    modules = ("model.embed_tokens", layers[0], "lm_head", layers[1])
    stems = [f"{start}{module}.lora_{'embedding_' * ('embed' in module)}" for module in modules]
    tensors = {f"{stem}{side}": np.ones((4, 4), np.float32) for stem in stems for side in "AB"}
    alphas = dict(zip(PATTERNS, (16, 32, 64), strict=True))
    folder = write_adapter(tmp_path / "a", tensors, r=4, lora_alpha=8, alpha_pattern=alphas)
    scales = {name: pair.scale for name, pair in import_adapter(folder).require_sound().pairs.items()}
    expected = [alphas.get(get_pattern_key(list(PATTERNS), module), 8) / 4 for module in modules]
    assert expected == [4, 8, 16, 2]
    ours = ("embed_tokens", "layers.1.self_attn.q_proj", "lm_head", "layers.2.self_attn.k_proj")
    assert scales == dict(zip(ours, expected, strict=True))


def test_partial_targets_and_layers_are_told() -> None:
    down: Imported = import_adapter(FIXTURES / "a_down_only")
    assert {projection for _, projection in down.experts} == {"down"}
    assert down.zero_filled(EXPERTS) == 2 * 2 * EXPERTS
    assert down.absent_experts(EXPERTS) == {}
    one = import_adapter(FIXTURES / "a_one_layer")
    assert one.expert_layers == [1]
    assert one.zero_filled(EXPERTS) == 0


@pytest.mark.parametrize("form", ["float16", "bfloat16", "A in float16, B in bfloat16", "every third in float32"])
def test_an_adapter_in_any_number_format_is_what_its_file_says(form: str, tmp_path: Path) -> None:
    """Also several formats in one file: each tensor is read as it is stored."""
    fixture = FIXTURES / "b_qwen3_moe_0212"
    tensors = load_file(fixture / WEIGHTS)
    if form == "every third in float32":
        changed = {name: t.float() if n % 3 == 0 else t.bfloat16() for n, (name, t) in enumerate(tensors.items())}
    elif form.startswith("A"):
        changed = {name: t.half() if "lora_A" in name else t.bfloat16() for name, t in tensors.items()}
    else:
        changed = {name: t.to(getattr(torch, form)) for name, t in tensors.items()}
    for folder, content in (("stored", changed), ("same", {name: t.float() for name, t in changed.items()})):
        (tmp_path / folder).mkdir()
        shutil.copy(fixture / "adapter_config.json", tmp_path / folder)
        save_file(content, str(tmp_path / folder / WEIGHTS))
    stored, same = (import_adapter(tmp_path / folder).require_sound() for folder in ("stored", "same"))
    assert stored.pairs.keys() == same.pairs.keys()
    for module, pair in stored.pairs.items():
        assert np.array_equal(pair.delta(), same.pairs[module].delta()), module


def test_a_matrix_that_peft_targeted_as_a_parameter_is_the_modules(tmp_path: Path) -> None:
    """`target_parameters` of two dimensions, beside a module that is targeted by its name."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_model("qwen3_moe", tmp_path / "base")

    def bare() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    parameters = ["self_attn.k_proj.weight", "self_attn.o_proj.weight"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    trained, rng = get_peft_model(bare(), config), torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng)
    trained.save_pretrained(tmp_path / "a")
    before = dict(bare().named_parameters())
    merged = dict(PeftModel.from_pretrained(bare(), tmp_path / "a").merge_and_unload().named_parameters())
    found = import_adapter(tmp_path / "a", read_checkpoint(base)).require_sound().pairs
    assert len(found) == 9
    for module, pair in found.items():
        delta = (merged[f"model.{module}.weight"] - before[f"model.{module}.weight"]).detach().numpy()
        np.testing.assert_allclose(pair.delta(), delta, atol=1e-4)
