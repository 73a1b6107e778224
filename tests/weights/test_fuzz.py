"""Readers on broken input: whatever the bytes, they give a result or a LaunchError, never another exception.

The same few cases by default; `make fuzz` goes on for an hour with others.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import write_checkpoint

from kt_launch.commandline.adapter_tables import report
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.experts import ExpertSource, fingerprint
from kt_model.importer import import_adapter
from kt_model.importer.names import read_key
from kt_model.tensors.header import BITS, read_header
from kt_model.weights.folder import LayerReader, read_folder
from kt_model.weights.packed import CacheKey, PackedLayer, read_entry, write_entry
from kt_model.weights.quantizing import quantize

ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"
SEEDS = (
    *("fixtures/a_down_only", "fixtures/b_one_layer", "fixtures/c_mixtral_0212", "fixtures/kt_training"),
    *("cases/unsloth_marked_grouped_by_expert", "cases/tinker_shared_outer", "cases/shards"),
)

FEWER = max(1, settings().max_examples // 4)
"""For those that write a checkpoint's files each time."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def holds(read: Callable[[], Any]) -> None:
    """A result, or an error of the user's."""
    try:
        read()
    except (LaunchError, LaunchErrors) as error:
        assert str(error)


def damage(content: bytes, seed: int, cuts: int) -> bytes:
    """Some bytes changed, taken away, doubled or inserted; half of the damage goes to the header."""
    rng, found = random.Random(seed), bytearray(content)
    for _ in range(cuts):
        if not found:
            break
        end = len(found) if rng.random() < 0.5 else min(len(found), 512)
        place = rng.randrange(end)
        kind = rng.randrange(4)
        if kind == 0:
            found[place] = rng.randrange(256)
        elif kind == 1:
            del found[place : place + rng.randrange(1, 64)]
        elif kind == 2:
            found[place:place] = found[place : place + rng.randrange(1, 64)]
        else:
            found[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


def in_folder(files: dict[str, bytes], read: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        holds(lambda: read(Path(name)))


def adapter_files(seed: str) -> dict[str, bytes]:
    folder = ADAPTERS / seed
    return {file.name: file.read_bytes() for file in folder.iterdir() if "adapter" in file.name or "fused" in file.name}


def read_all(folder: Path) -> None:
    """Everything that looks at an adapter."""
    imported = import_adapter(folder)
    report(imported, None)
    for pair in imported.pairs.values():
        pair.delta()


@given(st.binary(max_size=200))
def test_any_bytes_as_a_safetensors_file(content: bytes) -> None:
    in_folder({"x.safetensors": content}, lambda folder: read_header(folder / "x.safetensors"))


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F12", None, 3]),
        "shape": st.lists(st.integers(-1, 6) | st.integers(0, 1 << 63), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 70), min_size=2, max_size=2) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=3), st.binary(max_size=64), st.integers(-8, 8))
def test_any_header_that_is_json(header: dict[str, Any], data: bytes, off_by: int) -> None:
    text = json.dumps(header).encode()
    content = max(0, len(text) + off_by).to_bytes(8, "little") + text + data
    in_folder({"x.safetensors": content}, lambda folder: read_header(folder / "x.safetensors"))


@given(st.sampled_from(SEEDS), st.integers(0, 1 << 40), st.integers(1, 4))
def test_a_damaged_adapter(seed: str, rng: int, cuts: int) -> None:
    files = adapter_files(seed)
    name = random.Random(rng).choice(sorted(files))
    in_folder(files | {name: damage(files[name], rng, cuts)}, read_all)


KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights",
        "target_modules", "target_parameters", "peft_version", "use_dora", "modules_to_save", "lora_B_layout",
        "unsloth_fused_expert_lora", "auto_mapping", "lora_A_layout", "use_newlora", "notes")  # fmt: skip


@given(st.sampled_from(SEEDS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_settings(seed: str, changes: dict[str, Any]) -> None:
    files = adapter_files(seed)
    content = json.loads(files["adapter_config.json"]) | changes
    in_folder(files | {"adapter_config.json": json.dumps(content).encode()}, read_all)


@given(JSON | st.dictionaries(st.text(max_size=8), JSON, max_size=3).map(lambda names: {"weight_map": names}))
def test_any_index_of_an_adapters_shards(content: Any) -> None:
    files = adapter_files("cases/shards")
    in_folder(files | {"adapter_model.safetensors.index.json": json.dumps(content).encode()}, read_all)


PARTS = ("base_model", "model", "layers", "0", "1", "999999999", "mlp", "experts", "base_layer", "block_sparse_moe",
         "gate_proj", "w1", "self_attn", "q_proj", "gate", "shared_experts", "lora_A", "lora_B", "weight", "default",
         "lm_head", "embed_tokens", "unembed_tokens", "lora_embedding_A", "_orig_mod", "module",
         "", "²", "-1")  # fmt: skip


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map(".".join))
def test_any_key(text: str) -> None:
    assert read_key(text)


@settings(max_examples=FEWER)
@given(st.data())
def test_a_damaged_folder_of_quantized_experts(tmp_path_factory: Any, data: st.DataObject) -> None:
    made = _made(tmp_path_factory)
    name = data.draw(st.sampled_from(sorted(file.name for file in (made / "q").iterdir())))
    rng, cuts = data.draw(st.integers(0, 1 << 40)), data.draw(st.integers(1, 3))

    def read(folder: Path) -> None:
        found = read_folder(folder, "int8", read_checkpoint(made / "m"))
        LayerReader(found.path, 1).expert(0)

    files = {file.name: file.read_bytes() for file in (made / "q").iterdir()}
    in_folder(files | {name: damage(files[name], rng, cuts)}, read)


@settings(max_examples=FEWER)
@given(st.data())
def test_a_damaged_checkpoint(tmp_path_factory: Any, data: st.DataObject) -> None:
    made = _made(tmp_path_factory)
    files = {file.name: file.read_bytes() for file in (made / "m").iterdir()}
    name = data.draw(st.sampled_from(sorted(files)))
    rng, cuts = data.draw(st.integers(0, 1 << 40)), data.draw(st.integers(1, 3))
    in_folder(
        files | {name: damage(files[name], rng, cuts)},
        lambda folder: fingerprint(ExpertSource(read_checkpoint(folder, float8=True))),
    )


@settings(max_examples=FEWER)
@given(st.data())
def test_a_damaged_entry_of_the_packed_cache(tmp_path_factory: Any, data: st.DataObject) -> None:
    made = _packed(tmp_path_factory)
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    name = data.draw(st.sampled_from(sorted(files)))
    rng, cuts = data.draw(st.integers(0, 1 << 40)), data.draw(st.integers(1, 3))

    def read(folder: Path) -> None:
        entry = read_entry(folder)
        for layer in entry.layers:
            entry.map_layer(layer)
            entry.intermediate_size(layer)

    in_folder(files | {name: damage(files[name], rng, cuts)}, read)


def _packed(factory: Any) -> Path:
    """An entry of two layers, made once."""
    folder: Path = factory.getbasetemp() / "fuzzed-packed"
    made = list((folder / "packed").glob("AMX*-*[0-9a-f]"))
    if not made:
        weights = _made(factory) / "q"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KT_LAUNCH_CACHE", str(folder))
            layers = [PackedLayer(number, 16, [np.full(100, number, np.uint8)]) for number in (1, 2)]
            made = [write_entry(CacheKey(weights, "int8", "layout 1"), layers).path]
    return made[0]


def _made(factory: Any) -> Path:
    """A checkpoint of two shards and its quantized folder, made once."""
    folder: Path = factory.getbasetemp() / "fuzzed"
    if not (folder / "q").exists():
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint = write_checkpoint(folder / "m", shards=2, num_hidden_layers=2, hidden_size=16)
        quantize(ExpertSource(read_checkpoint(checkpoint)), "int8", folder / "q")
    return folder
