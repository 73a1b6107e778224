"""action=merge: base + ΔW, tensor by tensor, loadable by transformers; and what must not happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantize import write_float8
from tiny_checkpoints import write_checkpoint as write_model
from weight_files import Ended, snapshot, write_adapter, write_checkpoint
from written import add_to_model, write_fused

from kt_launch.checkpoint import read_checkpoint
from kt_launch.importer import import_adapter
from kt_launch.weights.experts import ExpertSource
from kt_launch.weights.merging import merge, tensor_name

Launch = Callable[..., Ended]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_is_the_rounded_sum(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", family, dtype, shards=3)
    adapter = write_adapter(tmp_path / "a", checkpoint)
    base = read_checkpoint(checkpoint)
    imported = import_adapter(adapter, base).demand_sound()
    assert merge(ExpertSource(base), imported, tmp_path / "out")
    before, after = all_tensors(checkpoint), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    deltas = {tensor_name(pair, base): torch.from_numpy(pair.delta()) for pair in imported.pairs.values()}
    assert deltas.keys() <= before.keys()
    for name, weight in before.items():
        expected = (weight.float() + deltas[name]).to(dtype) if name in deltas else weight
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "mixtral"])
def test_transformers_loads_it_and_gives_the_logits_of_base_and_adapter(family: str, tmp_path: Path) -> None:
    """From a float32 base, so that nothing is rounded: the logits agree to float32's own noise."""
    from transformers import AutoModelForCausalLM

    checkpoint = write_model(family, tmp_path / "m")
    file = checkpoint / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    base = read_checkpoint(checkpoint)
    imported = import_adapter(write_fused(tmp_path / "a", checkpoint, seed=3), base).demand_sound()
    merge(ExpertSource(base), imported, tmp_path / "out")
    ids = torch.tensor([[5, 17, 400, 33, 9]])
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        plain = model(ids).logits
        add_to_model(model, imported)
        expected = model(ids).logits
    spread = float(expected.std())
    assert float((found - expected).abs().max()) < 1e-4 * spread
    assert float((plain - expected).abs().max()) > 0.5 * spread


def test_float8_becomes_bfloat16_without_scales(tmp_path: Path) -> None:
    checkpoint, exact = write_float8(tmp_path / "m")
    adapter = write_adapter(tmp_path / "a", checkpoint)
    base = read_checkpoint(checkpoint, float8=True)
    imported = import_adapter(adapter, base).demand_sound()
    merge(ExpertSource(base), imported, tmp_path / "out")
    after = all_tensors(tmp_path / "out")
    assert not any(name.endswith("_scale_inv") for name in after)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    delta = torch.from_numpy(imported.pairs["layers.1.experts.0.gate"].delta())
    assert torch.equal(after[name], (exact[name] + delta).to(torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read_checkpoint(tmp_path / "out")


def test_the_command_and_its_second_run(launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", shards=2)
    adapter = write_adapter(tmp_path / "a", checkpoint)
    words = ["action=merge", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}"]
    before = snapshot(checkpoint), snapshot(adapter)
    out = tmp_path / "out"
    ended = launch(*words, f"merge.path={out}")
    assert (ended.code, ended.out) == (0, f"made: {out}\n"), ended.err
    assert launch(*words, f"merge.path={out}").out == f"there already: {out}\n"
    assert before == (snapshot(checkpoint), snapshot(adapter))


def test_a_merge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_launch.errors import LaunchError

    checkpoint = write_checkpoint(tmp_path / "m", shards=3)
    base, out = read_checkpoint(checkpoint), tmp_path / "out"
    imported = import_adapter(write_adapter(tmp_path / "a", checkpoint), base)
    last = tmp_path / "out.partial" / "model-00003-of-00003.safetensors"
    last.mkdir(parents=True)
    (last / "in_the_way").write_text("")
    with pytest.raises(LaunchError, match=r"model-00003-of-00003\.safetensors: cannot be written"):
        _merge_over(last, base, imported, out)
    assert not out.exists()
    first = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    stamp = first.stat().st_mtime_ns
    (last / "in_the_way").unlink()
    last.rmdir()
    assert merge(ExpertSource(base), imported, out)
    assert (out / first.name).stat().st_mtime_ns == stamp


def _merge_over(last: Path, base: object, imported: object, out: Path) -> None:
    """A merge whose last shard cannot be put in place. The state of this very merge keeps the folder from clearing."""
    from kt_launch.weights import merging
    from kt_launch.weights.making import STATE

    source = ExpertSource(base)  # type: ignore[arg-type]
    key = {
        "fingerprint": merging.fingerprint(source),
        "adapter": merging._adapter_key(imported.path),  # type: ignore[attr-defined]
        "version": 1,
    }
    (last.parent / STATE).write_text(json.dumps({"key": key, "pieces": {}}))
    merge(source, imported, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "merge.path: no folder given for the merged checkpoint. Type merge.path=/its/folder."),
        (["merge.path={base}"], "merge.path: {base} is inside of {base}, which is read."),
        (["merge.path={base}/in"], "merge.path: {base}/in is inside of {base}, which is read."),
        (["merge.path={out}", "lora.adapters.b.path={adapter}"], "lora: one adapter can be merged, chosen are b, a."),
    ],
)
def test_what_cannot_be_merged(words: list[str], message: str, launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    names = {"base": checkpoint, "adapter": write_adapter(tmp_path / "a", checkpoint), "out": tmp_path / "out"}
    typed = ["lora.name=a", f"lora.path={names['adapter']}", *(word.format(**names) for word in words)]
    before = snapshot(tmp_path)
    ended = launch("action=merge", "model=auto", f"model.path={checkpoint}", *typed)
    assert ended.code == 2
    assert message.format(**names) in ended.err
    assert snapshot(tmp_path) == before


def test_an_adapter_of_another_base_is_not_merged(launch: Launch, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", write_checkpoint(tmp_path / "other", moe_intermediate_size=32))
    checkpoint = write_checkpoint(tmp_path / "m")
    words = [f"model.path={checkpoint}", f"lora.path={adapter}", f"merge.path={tmp_path / 'out'}"]
    ended = launch("action=merge", "model=auto", *words)
    assert ended.code == 2
    assert "dimensions that do not fit the base: model.layers.1.mlp.experts.0.down_proj is [96, 32], " in ended.err
    assert not (tmp_path / "out").exists()
