"""Experts that lie fused on disk are the experts that they are: planned, quantized, merged and handed to SGLang exactly
as those of the same checkpoint with single experts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_checkpoints import fuse, save_fused, transpose
from odd_checkpoints import split
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS
from tiny_checkpoints import write_checkpoint as write_tiny
from weight_files import HIDDEN, Ended, snapshot, write_adapter, write_checkpoint

from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource, fingerprint
from kt_model.importer import import_adapter
from kt_model.tensors.header import read_header
from kt_model.tensors.writer import ShardWriter, TensorSpec
from kt_model.weights.merging import merge
from kt_model.weights.quantizing import quantize

Launch = Callable[..., Ended]
WAYS = {"straight": False, "transposed": True}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as hubs have it, and as transformers saves it in its own format."""
    root = tmp_path_factory.mktemp(request.param)
    return write_tiny(request.param, root / "hub"), save_fused(request.param, root / "fused")


@pytest.mark.parametrize("transposed", WAYS.values(), ids=WAYS)
def test_what_transformers_saves_is_the_hubs_checkpoint(
    saved: tuple[Path, Path], transposed: bool, launch: Launch, tmp_path: Path
) -> None:
    hub, fused = saved[0], shutil.copytree(saved[1], tmp_path / "fused")
    if transposed:
        transpose(fused)
    before, after = read_checkpoint(hub), read_checkpoint(fused)
    assert {name: (t.dtype, t.shape) for name, t in after.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in before.tensors.items()
    }
    assert after.other_bytes == before.other_bytes
    assert after.moe_layers == before.moe_layers
    assert_same(handed_to_sglang(fused), load_file(hub / "model.safetensors"))
    adapter = write_adapter(tmp_path / "adapter", hub)
    planned = launch("action=plan", "model=auto", f"model.path={fused}", f"lora.path={adapter}")
    assert planned.code == 0, planned.err


def handed_to_sglang(folder: Path) -> dict[str, torch.Tensor]:
    """What SGLang's loader gets of a checkpoint, through its iterator and our hook around it."""
    from kt_sglang.checkpoint.reading import iterate_needed

    base = read_checkpoint(folder)
    return dict(iterate_needed([str(file) for file in base.files], frozenset(), base))


def test_the_writer_of_these_tests_fuses_as_transformers_does(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "m")
    fuse(folder)
    assert_same(load_file(folder / "model.safetensors"), load_file(saved[1] / "model.safetensors"))


SIZES = {"2I = H": (64, 32), "I = H": (64, 64), "odd": (40, 72), "wide": (32, 96)}
"""Hidden size and inner width: in the first two, one of the two fused tensors looks the same both ways."""


@pytest.mark.parametrize("transposed", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_and_merged_they_give_the_same_bytes(
    dtype: torch.dtype, sizes: tuple[int, int], transposed: bool, tmp_path: Path
) -> None:
    changes = {"hidden_size": sizes[0], "moe_intermediate_size": sizes[1]}
    single = write_checkpoint(tmp_path / "single", "qwen3_moe", dtype, **changes)
    fused = shutil.copytree(single, tmp_path / "fused")
    fuse(fused, transposed)
    adapter = write_adapter(tmp_path / "a", single)
    for folder in (single, fused):
        base = read_checkpoint(folder)
        source = ExpertSource(base)
        quantize(source, "int4", folder.with_name(f"{folder.name}-q"))
        merge(source, import_adapter(adapter, base).require_sound(), folder.with_name(f"{folder.name}-m"))
    made = [snapshot(tmp_path / f"{name}-q") for name in ("single", "fused")]
    layers = [{name: content for name, content in one.items() if name.startswith("layer-")} for one in made]
    assert layers[0] == layers[1]
    assert len(layers[0]) == 3
    assert_same(all_tensors(tmp_path / "fused-m"), all_tensors(tmp_path / "single-m"))


def test_what_was_quantized_of_single_experts_serves_fused_ones(tmp_path: Path) -> None:
    single = write_checkpoint(tmp_path / "single")
    fused = shutil.copytree(single, tmp_path / "fused")
    fuse(fused)
    assert fingerprint(ExpertSource(read_checkpoint(fused))) == fingerprint(ExpertSource(read_checkpoint(single)))


@pytest.mark.parametrize("transposed", WAYS.values(), ids=WAYS)
def test_other_weights_are_told_by_the_fingerprint(transposed: bool, tmp_path: Path) -> None:
    found = set()
    for seed in (0, 1):
        folder = write_checkpoint(tmp_path / f"{seed}", seed=seed)
        fuse(folder, transposed)
        found.add(fingerprint(ExpertSource(read_checkpoint(folder))))
    assert len(found) == 2


def test_in_shards(tmp_path: Path) -> None:
    """gate_up_proj and down_proj of a layer in two files."""
    hub = write_tiny("mixtral", tmp_path / "hub")
    fused = shutil.copytree(hub, tmp_path / "fused")
    fuse(fused, transposed=True)
    split(fused)
    assert len(read_checkpoint(fused).files) == 2
    assert_same(handed_to_sglang(fused), load_file(hub / "model.safetensors"))


def test_experts_from_elsewhere_are_left_unread(tmp_path: Path) -> None:
    from kt_sglang.checkpoint.reading import iterate_needed

    folder = write_checkpoint(tmp_path / "m")
    fuse(folder)
    base = read_checkpoint(folder)
    experts = frozenset(name for name in base.tensors if ".layers.1.mlp.experts." in name)
    found = dict(iterate_needed([str(file) for file in base.files], experts, base))
    assert found.keys() == base.tensors.keys() - experts


def test_views_of_a_file_that_does_not_align_its_tensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    expected = load_file(folder / "model-00001-of-00001.safetensors")
    fuse(folder, transposed=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    odd = [TensorSpec("model.odd", "U8", (1,)), *(TensorSpec(n, "BF16", tuple(t.shape)) for n, t in tensors.items())]
    with ShardWriter(file, odd) as writer:
        writer.write("model.odd", torch.zeros(1, dtype=torch.uint8).numpy())
        for name, tensor in tensors.items():
            writer.write(name, tensor.view(torch.uint8).numpy())
    assert read_header(file).tensors["model.layers.1.mlp.experts.down_proj"].start % 2
    bits = ExpertSource(read_checkpoint(folder)).read(2, 3)
    for part in ("gate", "up", "down"):
        stored = expected[f"model.layers.2.mlp.experts.3.{part}_proj.weight"]
        assert torch.equal(torch.from_numpy(bits[part].copy()).view(torch.bfloat16), stored)


PEAK = """
import re, sys
from pathlib import Path
from kt_model.checkpoint import read_checkpoint
from kt_model import experts
from kt_model.weights.quantizing import quantize
experts.HELD_BYTES = 1 << 22
quantize(experts.ExpertSource(read_checkpoint(Path(sys.argv[1]))), "int8", Path(sys.argv[2]), 1)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_a_layers_experts(tmp_path: Path) -> None:
    """16 times the experts, 48 MB more in a tensor and its neighbour: the peak may grow by a third of that."""
    peaks, inner = [], 1408
    for experts in (4, 64):
        config: dict[str, Any] = {"num_hidden_layers": 2, "moe_intermediate_size": inner, "n_routed_experts": experts}
        folder = write_checkpoint(tmp_path / f"m{experts}", **config)
        fuse(folder, transposed=True)
        words = [sys.executable, "-c", textwrap.dedent(PEAK), str(folder), str(tmp_path / f"q{experts}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 3 * inner * HIDDEN * 2 * (64 - 4) // 3, peaks


def test_forms_that_cannot_be_right(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    file = folder / "model-00001-of-00001.safetensors"
    single = load_file(file)
    fuse(folder)
    fused = load_file(file)
    gate_up, down = (f"model.layers.2.mlp.experts.{name}_proj" for name in ("gate_up", "down"))

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(LaunchError) as refused:
            read_checkpoint(folder, float8=True)
        return str(refused.value)

    fewer = refusal(fused | {gate_up: fused[gate_up][:3].contiguous()})
    assert f"{gate_up} has shape [3, 128, 96], but [4, 128, 96] is expected from config.json" in fewer
    other_way = refusal(fused | {down: fused[down].transpose(1, 2).contiguous()})
    assert f"{down} has shape [4, 64, 96], but [4, 96, 64] is expected from config.json" in other_way
    without = refusal({name: tensor for name, tensor in fused.items() if name != down})
    assert "no tensor model.layers.2.mlp.experts.0.down_proj.weight, but config.json declares it" in without
    twice = refusal(fused | {name: tensor for name, tensor in single.items() if ".experts.0.up" in name})
    assert (
        "holds model.layers.1.mlp.experts.0.up_proj.weight, which is in model-00001-of-00001.safetensors too" in twice
    )
    float8 = refusal(fused | {gate_up: fused[gate_up].to(torch.float8_e4m3fn)})
    assert f"{gate_up} has all experts of a layer in float8" in float8
