"""Adapters that other tools than PEFT's save_pretrained wrote: stacked in three dimensions, in shards, with wrappers in
their names, or torn apart by the trainer; cases/ has files as they came. ΔW is held against the definition, entry by
entry: both sides multiply the same float64 numbers and round once to float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoints import write_checkpoint
from tiny_files import adapter_tensors, write_adapter
from written import split_into_shards, write_kt_training, write_per_expert, write_stacked

from kt_launch.cli import main
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.importer import import_adapter
from kt_model.importer.files import iterate_files
from kt_model.importer.names import WRAPPERS

CASES = Path(__file__).resolve().parent / "cases"
FILE, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"
EXPERT_ENDS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "m")


def problems(folder: Path) -> str:
    with pytest.raises((LaunchError, LaunchErrors)) as raised:
        import_adapter(folder).require_sound()
    return str(raised.value)


def product(b: Any, a: Any, scale: float) -> np.ndarray:
    found: np.ndarray = scale * b.double().numpy() @ a.double().numpy()
    return found.astype(np.float32)


# ---- experts stacked in three dimensions


def test_a_shared_outer_factor_serves_every_expert() -> None:
    """Tinker's file: one A for w1 and w3, one B for w2."""
    folder = CASES / "tinker_shared_outer"
    imported, tensors = import_adapter(folder).require_sound(), load_file(folder / FILE)
    assert (imported.format, len(imported.pairs)) == ("E", 3 * 8 * 3)
    assert sum(imported.keys.values()) == len(tensors)
    for pair in imported.pairs.values():
        name = {"gate": "w1", "up": "w3", "down": "w2"}[pair.target.projection]
        stem = f"base_model.model.model.layers.{pair.target.layer}.mlp.experts.{name}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        expected = product(b[pair.target.expert % b.shape[0]], a[pair.target.expert % a.shape[0]], 8 / 4)
        np.testing.assert_array_equal(pair.delta(), expected)


def test_a_shared_factor_is_not_copied() -> None:
    pairs = import_adapter(CASES / "tinker_shared_outer").pairs
    first, last = (pairs[f"layers.0.experts.{expert}.gate"] for expert in (0, 7))
    assert np.shares_memory(first.a.array, last.a.array)
    assert not np.shares_memory(first.b.array, last.b.array)


def test_stacks_whose_factors_are_each_experts_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_stacked(tmp_path / "a", checkpoint, shared=False)
    tensors = load_file(folder / FILE)
    for pair in import_adapter(folder, read_checkpoint(checkpoint)).require_sound().of_kind("routed_experts"):
        name = {"gate": "w1", "up": "w3", "down": "w2"}[pair.target.projection]
        stem = f"base_model.model.model.layers.{pair.target.layer}.mlp.experts.{name}"
        a, b = (tensors[f"{stem}.lora_{side}.weight"][pair.target.expert] for side in "AB")
        np.testing.assert_array_equal(pair.delta(), product(b, a, 2))


@pytest.mark.parametrize(("experts", "message"), [(5, "not low-rank pairs: "), (1, "expert projections of the layers")])
def test_stacks_of_another_number_of_experts(experts: int, message: str, checkpoint: Path, tmp_path: Path) -> None:
    from kt_model.importer.facts import read_adapter

    folder = write_stacked(tmp_path / "a", checkpoint)
    tensors = load_file(folder / FILE)
    cut = {name: tensor[:experts] if "w1" in name or experts == 1 else tensor for name, tensor in tensors.items()}
    cut |= {name: tensors[name].expand(8, -1, -1) for name in tensors if "w1.lora_A" in name and experts > 1}
    save(cut, folder / FILE)
    with pytest.raises((LaunchError, LaunchErrors), match=message):
        read_adapter("a", folder, read_checkpoint(checkpoint), where="lora.path", allow_missing=False)


def test_stacked_and_single_experts_in_one_file_name_both(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_stacked(tmp_path / "a", checkpoint)
    single = load_file(write_per_expert(tmp_path / "b", checkpoint, [".experts.0.gate_proj"]) / FILE)
    save(load_file(folder / FILE) | single, folder / FILE)
    text = problems(folder)
    assert "modules that appear twice, in two formats: model.layers.0.mlp.experts.0.gate_proj and " in text


def save(tensors: dict[str, Any], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)


def test_tinkers_name_of_the_output_layer(tmp_path: Path) -> None:
    stem = "base_model.model.model.unembed_tokens"
    tensors = {f"{stem}.lora_A.weight": np.ones((2, 32), "f"), f"{stem}.lora_B.weight": np.ones((64, 2), "f")}
    imported = import_adapter(write_adapter(tmp_path / "a", adapter_tensors() | tensors)).require_sound()
    assert imported.pairs["lm_head"].out_features == 64


# ---- names in which wrappers stand

PLACES: dict[str, Callable[[str, str], str]] = {
    "first": lambda key, part: f"{part}.{key}",
    "after the model": lambda key, part: key.replace(".layers.", f".{part}.layers."),
    "after the layer": lambda key, part: key.replace(".mlp.", f".{part}.mlp."),
    "after the experts": lambda key, part: key.replace(".experts.", f".experts.{part}."),
    "before lora": lambda key, part: key.replace(".lora_", f".{part}.lora_"),
    "before weight": lambda key, part: key.replace(".weight", f".default.{part}.weight"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_mean_nothing_wherever_they_stand(wrapper: str, place: str, tmp_path: Path) -> None:
    plain = import_adapter(write_adapter(tmp_path / "plain")).pairs
    changed = {PLACES[place](name, wrapper): tensor for name, tensor in adapter_tensors().items()}
    found = import_adapter(write_adapter(tmp_path / "a", changed)).require_sound().pairs
    assert found.keys() == plain.keys()


def test_every_wrapper_at_once_and_an_adapters_own_name(tmp_path: Path) -> None:
    outer = ".".join([*WRAPPERS, "pretrained_model"])
    changed = {
        f"{outer}.{name}".replace(".weight", f".west.{'.'.join(WRAPPERS)}.weight"): tensor
        for name, tensor in adapter_tensors().items()
    }
    found = import_adapter(write_adapter(tmp_path / "a", changed)).require_sound().pairs
    assert found.keys() == import_adapter(write_adapter(tmp_path / "plain")).pairs.keys()


@pytest.mark.parametrize(
    "other",
    [
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: key.replace(".weight", ".west.weight"),
        lambda key: key.replace(".lora_", "._orig_mod.lora_"),
    ],
)
def test_one_module_under_two_names_is_told_with_both(other: Callable[[str], str], tmp_path: Path) -> None:
    tensors = adapter_tensors()
    key = next(iter(tensors))
    text = problems(write_adapter(tmp_path / "a", tensors | {other(key): tensors[key]}))
    assert "keys that mean the same module: " in text
    assert key in text
    assert other(key) in text


def test_whole_embeddings_under_two_names_are_told_with_both(tmp_path: Path) -> None:
    names = ["base_model.model.lm_head.base_layer.weight", "module.base_model.model.lm_head.base_layer.weight"]
    tensors = dict.fromkeys(names, np.ones((4, 4), "f"))
    assert f"same module: {names[0]} and {names[1]}" in problems(
        write_adapter(tmp_path / "a", adapter_tensors() | tensors)
    )


def test_kt_keys_of_one_module_are_told_with_both(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_kt_training(tmp_path / "a", checkpoint)
    file = folder / "fused_expert_lora.safetensors"
    tensors = load_file(file)
    save(tensors | {"model.layers.0.experts.gate_lora_a": tensors["layers.0.experts.gate_lora_a"]}, file)
    both = "layers.0.experts.gate_lora_a and model.layers.0.experts.gate_lora_a"
    assert f"keys that mean the same module: {both}" in problems(folder)


# ---- shards and their index


@pytest.fixture
def shards(checkpoint: Path, tmp_path: Path) -> Path:
    return split_into_shards(write_per_expert(tmp_path / "a", checkpoint, EXPERT_ENDS))


def test_shards_are_read_as_one(shards: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole = import_adapter(write_per_expert(tmp_path / "whole", checkpoint, EXPERT_ENDS), read_checkpoint(checkpoint))
    found = import_adapter(shards, read_checkpoint(checkpoint)).require_sound()
    assert (found.pairs.keys(), found.keys, found.bytes) == (whole.pairs.keys(), whole.keys, whole.bytes)
    for name, pair in found.pairs.items():
        np.testing.assert_array_equal(pair.delta(), whole.pairs[name].delta())


def test_every_file_of_an_adapter_in_shards_is_its_content(shards: Path) -> None:
    names = {file.name for file in iterate_files(shards)}
    assert names == {file.name for file in shards.iterdir()}


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def write_map(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def missing_shard(folder: Path) -> str:
    name = sorted(weight_map(folder).values())[0]
    (folder / name).unlink()
    return f"1 files that {INDEX} names are missing: {name}. Copy the whole folder again."


def both_forms(folder: Path) -> str:
    shutil.copy(folder / sorted(weight_map(folder).values())[0], folder / FILE)
    return f"has {FILE} and {INDEX}, and only one of them can be the adapter."


def no_index(folder: Path) -> str:
    (folder / INDEX).unlink()
    return f"adapter_model-00002-of-00002.safetensors, but no {INDEX}, which says what is in them."


def moved_tensor(folder: Path) -> str:
    places = weight_map(folder)
    key, name = next(iter(places.items()))
    other = next(each for each in places.values() if each != name)
    write_map(folder, places | {key: other})
    return f"{name} holds tensors that {INDEX} gives to {other}: {key}."


def unnamed_tensor(folder: Path) -> str:
    places = weight_map(folder)
    key, name = next(iter(places.items()))
    write_map(folder, {each: place for each, place in places.items() if each != key})
    return f"{name} holds tensors that {INDEX} does not name: {key}."


def absent_tensor(folder: Path) -> str:
    places = weight_map(folder)
    name = next(iter(places.values()))
    write_map(folder, places | {"more": name})
    return f"{name} has no tensors that {INDEX} says are in it: more."


def outside(folder: Path) -> str:
    write_map(folder, weight_map(folder) | {"more": "../secret.safetensors"})
    return "says that more is in '../secret.safetensors', outside of the folder. Do not trust it."


def no_map(folder: Path) -> str:
    write_map(folder, ["x"])
    return "is not an object of names."


def empty_map(folder: Path) -> str:
    write_map(folder, {})
    return f"{INDEX} names no file. Copy the whole folder again."


SPOILT = (missing_shard, both_forms, no_index, moved_tensor, unnamed_tensor, absent_tensor, outside, no_map, empty_map)


@pytest.mark.parametrize("spoil", SPOILT)
def test_an_index_that_is_not_true(spoil: Callable[[Path], str], shards: Path) -> None:
    expected = spoil(shards)
    assert expected in problems(shards)


# ---- what trainers leave when they save without gathering


def test_empty_tensors_are_zero_3s(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["action=inspect", f"lora.path={CASES / 'zero3_empty_tensors'}", "format=json"]) == 2
    out, err = capfd.readouterr()
    with safe_open(str(CASES / "zero3_empty_tensors" / FILE), "np") as opened:
        count = len(list(opened.keys()))
    assert json.loads(out)[0]["keys"]["refused"] == count
    message = (
        f"{count} tensors without values in {FILE}, as DeepSpeed ZeRO-3 leaves them when it saves without gathering"
    )
    assert f"lora.path: {message}: base_model." in err
    assert "Set stage3_gather_16bit_weights_on_model_save to true in DeepSpeed's configuration" in err


def test_a_file_without_tensors_is_zero_3s() -> None:
    text = problems(CASES / "zero3_empty_file")
    assert "hold no tensor at all, as DeepSpeed ZeRO-3 leaves them when it saves without gathering. Set stage3" in text


def test_flat_shards_are_told(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    key = next(iter(tensors))
    text = problems(write_adapter(tmp_path / "a", tensors | {key: tensors[key].ravel()}))
    message = f"1 tensors of one dimension in {FILE}, as FSDP and DeepSpeed keep shards while they train: {key}."
    assert message in text
