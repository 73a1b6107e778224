"""action=quantize: what is in the folder, from every stored type; resuming, waiting, and what must not happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    EXPERTS,
    HIDDEN,
    INNER,
    KT_LAUNCH,
    Ended,
    kill_half_way,
    snapshot,
    write_checkpoint,
    write_float8,
)

from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError
from kt_model.experts import FLOAT8_E4M3, ExpertSource, fingerprint, float32_of
from kt_model.families import FAMILIES, expert_weights
from kt_model.methods import METHODS, QUANTIZED
from kt_model.weights.folder import LayerReader, dequantized, read_folder
from kt_model.weights.quantizing import quantize

Launch = Callable[..., Ended]
# Of Gaussian weights: int8 with a scale a row, int4 with a scale for 32 inputs.
MOST_RELATIVE_ERROR = {"int8": 0.012, "int4": 0.11}


def source_of(checkpoint: Path) -> ExpertSource:
    return ExpertSource(read_checkpoint(checkpoint, float8=True))


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral"])
def test_values_stand_for_the_checkpoints(method: str, family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", family)
    source, target = source_of(checkpoint), tmp_path / "q"
    assert quantize(source, method, target)
    weights = load_file(checkpoint / "model-00001-of-00001.safetensors")
    for layer in source.base.moe_layers:
        reader = LayerReader(target, layer)
        for expert in range(EXPERTS):
            arrays = reader.expert(expert)
            for part, name in zip(("gate", "up", "down"), expert_weights(FAMILIES[family], layer, expert), strict=True):
                exact = weights[name].float().numpy()
                found = dequantized(METHODS[method], arrays[part], arrays[f"{part}_scale"], exact.shape[1])
                error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
                assert error < MOST_RELATIVE_ERROR[method], f"{name}: {error}"


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_kernel_computes_with_them_what_it_would_have_quantized_itself(method: str, tmp_path: Path) -> None:
    import kt_kernels

    source, target = source_of(write_checkpoint(tmp_path / "m")), tmp_path / "q"
    quantize(source, method, target)
    pool = kt_kernels.ThreadPool(1)
    outs = []
    for loads_files in (True, False):
        moe = kt_kernels.MoE(
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            method=METHODS[method].sglang_name,
            pool=pool,
        )
        for expert in range(EXPERTS):
            if loads_files:
                moe.load_quantized_expert(expert, LayerReader(target, 1).expert(expert))
            else:
                bits = source.read(1, expert)
                tensors = [torch.from_numpy(bits[part].copy()).view(torch.bfloat16) for part in ("gate", "up", "down")]
                moe.load_expert(expert, *tensors)
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]], dtype=torch.int32)
        out = torch.empty(5, HIDDEN, dtype=torch.float32)
        moe.forward(x, ids, torch.full((5, 2), 0.5), None, out)
        outs.append(out)
    assert torch.equal(*outs)
    assert outs[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_rounded_to_bfloat16_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", dtype=dtype)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    stored = load_file(checkpoint / "model-00001-of-00001.safetensors")[name]
    expected = stored.to(torch.bfloat16).float().numpy()
    assert stored.dtype == dtype
    assert np.array_equal(float32_of(source_of(checkpoint).read(1, 0)["gate"]), expected)


def test_float8_codes_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(FLOAT8_E4M3, expected)


def test_float8_blocks_are_scaled(tmp_path: Path) -> None:
    checkpoint, exact = write_float8(tmp_path / "m")
    source = source_of(checkpoint)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    expected = exact[name].to(torch.bfloat16).float().numpy()
    assert np.array_equal(float32_of(source.read(1, 0)["down"]), expected)
    assert quantize(source, "int8", tmp_path / "q")


def test_float8_without_its_scales(tmp_path: Path) -> None:
    checkpoint, _ = write_float8(tmp_path / "m")
    file = checkpoint / "model-00001-of-00001.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "scale_inv" not in name}, file)
    with pytest.raises(LaunchError, match=r"is float8, but .*_scale_inv is missing"):
        quantize(source_of(checkpoint), "int8", tmp_path / "q")
    assert not list(tmp_path.glob("q*"))


def test_nan_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    file = checkpoint / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][1, 1] = float("nan")
    save_file(tensors, file)
    with pytest.raises(LaunchError, match=r"NaN or infinity in model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight"):
        quantize(source_of(checkpoint), "int4", tmp_path / "q")
    assert not list(tmp_path.glob("q*"))


def test_the_command_makes_it_and_says_what_it_made(launch: Launch, cache: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", shards=3)
    ended = launch("action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int4")
    assert ended.code == 0, ended.err
    (folder,) = (path for path in (cache / "weights").iterdir() if path.is_dir())
    assert ended.out.startswith(f"made: {folder} (")
    assert "layer 1: relative L2 error " in ended.err
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["method"], manifest["group"]) == ("AMXINT4_SFT", 32)
    assert manifest["model"]["layers"] == [1, 2]
    for facts in manifest["shards"].values():
        assert facts["worst"] >= facts["relative_l2"] > 0
        assert len(facts["sha256"]) == 64
    again = launch("action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int4")
    assert again.out.startswith("there already: ")
    plan = launch("action=plan", "format=json", "model=auto", f"model.path={checkpoint}", "kt=int4")
    assert json.loads(plan.out)["resolved"]["kt.weight_path"]["value"] == str(folder)


def test_the_same_bytes_whatever_the_threads_and_the_instruction_set(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    for name, threads in (("one", 1), ("three", 3)):
        quantize(source_of(checkpoint), "int8", tmp_path / name, threads)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "three")


def test_missing_weights_say_the_command(launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    ended = launch("action=plan", "model=auto", f"model.path={checkpoint}", "kt.method=int8")
    assert ended.code == 2
    (line,) = ended.errors
    command = f"kt-launch quantize model=auto model.path={checkpoint} kt.method=int8"
    assert line == (f"kt.method: int8 needs kt.weight_path (no folder given). Run {command}, or add kt.prepare=true.")


def test_bf16_has_nothing_to_quantize(launch: Launch, tmp_path: Path) -> None:
    ended = launch("action=quantize", "model=auto", f"model.path={write_checkpoint(tmp_path / 'm')}")
    assert ended.code == 2
    assert "kt.method: bf16 is served from the checkpoint as it is" in ended.err


def test_it_goes_on_where_a_kill_stopped_it(cache: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", num_hidden_layers=10)
    target, partial = tmp_path / "q", tmp_path / "q.partial"
    words = ["action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int4", f"kt.weight_path={target}"]
    kill_half_way(words, cache, partial)
    assert not target.exists()
    kept = json.loads((partial / "state.json").read_text())["pieces"]
    assert 2 <= len(kept) < 9
    file_states = {name: (partial / name).stat().st_mtime_ns for name in kept}
    assert quantize(source_of(checkpoint), "int4", target)
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == file_states
    assert not partial.exists()
    assert not list(target.glob("*.tmp"))
    quantize(source_of(checkpoint), "int4", tmp_path / "whole")
    assert snapshot(target) == snapshot(tmp_path / "whole")


def test_leftovers_of_another_checkpoint_are_not_taken(tmp_path: Path) -> None:
    other = source_of(write_checkpoint(tmp_path / "other", seed=7))
    partial = tmp_path / "q.partial"
    quantize(other, "int8", tmp_path / "q")
    (tmp_path / "q").rename(partial)
    manifest = json.loads((partial / "manifest.json").read_text())
    (partial / "state.json").write_text(json.dumps({"key": manifest["key"], "pieces": manifest["shards"]}))
    quantize(source_of(write_checkpoint(tmp_path / "m")), "int8", tmp_path / "q")
    quantize(source_of(tmp_path / "m"), "int8", tmp_path / "clean")
    assert snapshot(tmp_path / "q") == snapshot(tmp_path / "clean")


def test_two_processes_at_once_make_it_once(cache: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", num_hidden_layers=20, moe_intermediate_size=256)
    words = ["action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'q'}"]
    both = [
        subprocess.Popen(
            [str(KT_LAUNCH), *words],
            env={**os.environ, "KT_LAUNCH_CACHE": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(out.partition(":")[0] for out, _ in said) == ["made", "there already"]
    assert len(list((tmp_path / "q").glob("layer-*"))) == 19


def test_a_folder_of_something_else_is_not_touched(launch: Launch, tmp_path: Path) -> None:
    checkpoint, mine = write_checkpoint(tmp_path / "m"), tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    ended = launch("action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={mine}")
    assert ended.code == 2
    assert f"{mine}: exists and was not made by kt-launch." in ended.err
    assert snapshot(mine) == {"letter.txt": b"dear"}


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_the_fingerprint_sees_every_matrix_of_every_expert(projection: str, tmp_path: Path) -> None:
    """An adapter on some of them, merged in, is another checkpoint."""
    checkpoint = write_checkpoint(tmp_path / "m")
    before = fingerprint(source_of(checkpoint))
    file = checkpoint / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.2.mlp.experts.3.{projection}_proj.weight"] *= 2
    save_file(tensors, file)
    assert fingerprint(source_of(checkpoint)) != before


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    one, three = (write_checkpoint(tmp_path / f"m{shards}", shards=shards) for shards in (1, 3))
    assert fingerprint(source_of(one)) == fingerprint(source_of(three))


PEAK = """
import re, sys
from pathlib import Path
from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.weights.quantizing import quantize
quantize(ExpertSource(read_checkpoint(Path(sys.argv[1]))), "int8", Path(sys.argv[2]), 1)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Six times the layers, 50 MB more weights: the peak may grow by less than three layers."""
    peaks = []
    for layers in (3, 18):
        checkpoint = write_checkpoint(tmp_path / f"m{layers}", num_hidden_layers=layers, moe_intermediate_size=1408)
        words = [sys.executable, "-c", textwrap.dedent(PEAK), str(checkpoint), str(tmp_path / f"q{layers}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    one_layer = 3 * 1408 * HIDDEN * 2 * EXPERTS
    assert peaks[1] - peaks[0] < 3 * one_layer + (8 << 20), peaks


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_of_a_tensor_parallel_group_add_up(tp_size: int, tmp_path: Path) -> None:
    """Each rank's cut of an expert, computed alone; their outputs sum to the whole expert's."""
    from kt_sglang.checkpoint.quantized import cut

    checkpoint = write_checkpoint(tmp_path / "m")
    for method in QUANTIZED:
        quantize(source_of(checkpoint), method, tmp_path / method)
        arrays = LayerReader(tmp_path / method, 1).expert(0)
        whole = {part: values_of(method, arrays, part, arrays[part]) for part in ("gate", "up", "down")}
        parts = [cut(arrays, method, rank, tp_size) for rank in range(tp_size)]
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            joined = np.concatenate([values_of(method, one, part, one[part]) for one in parts], axis=axis)
            assert np.array_equal(joined, whole[part])


def values_of(method: str, arrays: dict[str, np.ndarray], part: str, stored: np.ndarray) -> np.ndarray:
    inputs = stored.shape[1] * 8 // METHODS[method].bits
    return dequantized(METHODS[method], stored, arrays[f"{part}_scale"], inputs)


def test_a_folder_is_read_back(tmp_path: Path) -> None:
    source = source_of(write_checkpoint(tmp_path / "m"))
    quantize(source, "int8", tmp_path / "q")
    folder = read_folder(tmp_path / "q", "int8", source.base, fingerprint=fingerprint(source))
    assert folder.bytes == sum(file.stat().st_size for file in (tmp_path / "q").glob("layer-*"))
