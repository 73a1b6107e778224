"""action=merge: base + ΔW, tensor by tensor, loadable by transformers; and what must not happen."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint as write_model
from weight_files import KT_LAUNCH, Ended, kill_half_way, snapshot, write_adapter, write_checkpoint, write_float8
from written import add_to_model, write_fused, write_per_expert

from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.importer import Imported, import_adapter
from kt_model.tensors.stored import HELD_BYTES
from kt_model.weights import merging
from kt_model.weights.merging import merge, tensor_name

Launch = Callable[..., Ended]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_is_the_rounded_sum(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", family, dtype, shards=3)
    adapter = write_adapter(tmp_path / "a", checkpoint)
    base = read_checkpoint(checkpoint)
    imported = import_adapter(adapter, base).require_sound()
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
    imported = import_adapter(write_fused(tmp_path / "a", checkpoint, seed=3), base).require_sound()
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


def test_embeddings_and_matrices_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, the last one shorter: the same bytes as in one piece."""
    checkpoint = write_model("deepseek_v2", tmp_path / "m")
    base = read_checkpoint(checkpoint)
    ends = ["embed_tokens", "lm_head", "o_proj", ".experts.0.down_proj"]
    imported = import_adapter(write_per_expert(tmp_path / "a", checkpoint, ends), base).require_sound()
    merge(ExpertSource(base), imported, tmp_path / "whole")
    monkeypatch.setattr(merging, "BLOCK_BYTES", 5 * 4 * base.hidden_size)
    merge(ExpertSource(base), imported, tmp_path / "cut")
    before, whole, cut = (all_tensors(folder) for folder in (checkpoint, tmp_path / "whole", tmp_path / "cut"))
    for pair in imported.pairs.values():
        name, delta = tensor_name(pair, base), torch.from_numpy(pair.delta())
        delta = delta.T if "embed_tokens" in name else delta
        assert torch.equal(whole[name], (before[name].float() + delta).to(torch.bfloat16)), name
        assert bool((whole[name] != before[name]).any())
    assert all(torch.equal(cut[name], whole[name]) for name in before)


@pytest.mark.parametrize("parts", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["o_proj"]])
def test_of_an_embedding_that_is_the_head_too_only_what_has_an_adapter_is_changed(
    parts: list[str], tmp_path: Path
) -> None:
    """As PEFT computes it. The two are tied no more where one of them has changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    checkpoint = write_model("qwen3_moe", tmp_path / "m", tie_word_embeddings=True)
    file = checkpoint / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=parts, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "a")
    base = read_checkpoint(checkpoint)
    merge(ExpertSource(base), import_adapter(tmp_path / "a", base).require_sound(), tmp_path / "out")
    ids = torch.tensor([[5, 17, 400, 33, 9]])
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        expected = model(ids).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())
    untied = parts != ["o_proj"]
    assert ("lm_head.weight" in all_tensors(tmp_path / "out")) is untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not untied


@pytest.mark.parametrize("value", [float("nan"), 6e4])
def test_what_is_no_number_once_it_is_merged_is_named(value: float, launch: Launch, tmp_path: Path) -> None:
    """NaN in the base, and a sum that float16 does not reach."""
    checkpoint = write_checkpoint(tmp_path / "m", dtype=torch.float16)
    file = checkpoint / "model-00001-of-00001.safetensors"
    name = "model.layers.1.mlp.experts.0.gate_proj"
    adapter = write_adapter(tmp_path / "a", checkpoint)
    tensors, factors = load_file(file), load_file(adapter / "adapter_model.safetensors")
    tensors[f"{name}.weight"][0, 0] = value
    for side, place in (("A", (0, 0)), ("B", (0, 0))):
        factors[f"base_model.model.{name}.lora_{side}.weight"][place] = 100
    save_file(tensors, file)
    save_file(factors, adapter / "adapter_model.safetensors")
    words = [f"model.path={checkpoint}", f"lora.path={adapter}", f"merge.path={tmp_path / 'out'}"]
    ended = launch("action=merge", "model=auto", *words)
    assert ended.code == 2
    assert ended.errors == [
        f"{file}: {name}.weight has NaN or infinity once it is merged into F16. Get the file again, or train the "
        "adapter again."
    ]
    assert not list(tmp_path.glob("out*"))


def test_one_shard_that_is_not_called_model_keeps_its_index(tmp_path: Path) -> None:
    """Else transformers would not find it."""
    checkpoint = write_checkpoint(tmp_path / "m")
    base = read_checkpoint(checkpoint)
    merge(ExpertSource(base), import_adapter(write_adapter(tmp_path / "a", checkpoint), base), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    assert index["weight_map"].keys() == base.tensors.keys()


def test_a_killed_merge_goes_on_and_two_at_once_make_it_once(cache: Path, tmp_path: Path) -> None:
    """kill -9 in the middle; then two processes that both end right, with what one process would have made."""
    checkpoint = write_checkpoint(tmp_path / "m", shards=10, num_hidden_layers=6)
    adapter, out = write_adapter(tmp_path / "a", checkpoint), tmp_path / "out"
    words = ["action=merge", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}", f"merge.path={out}"]

    def begin() -> subprocess.Popen[str]:
        env = {**os.environ, "KT_LAUNCH_CACHE": str(cache)}
        command = [str(KT_LAUNCH), *words]
        return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    partial = tmp_path / "out.partial"
    kill_half_way(words, cache, partial)
    assert not out.exists()
    kept = json.loads((partial / "state.json").read_text())["pieces"]
    file_states = {name: (partial / name).stat().st_mtime_ns for name in kept}
    assert 2 <= len(kept) < 10
    both = [begin(), begin()]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(text.partition(":")[0] for text, _ in said) == ["made", "there already"]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == file_states
    base = read_checkpoint(checkpoint)
    merge(ExpertSource(base), import_adapter(adapter, base), tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")


PEAK = """
import re, sys
from pathlib import Path
from kt_launch.cli import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_shard_nor_with_its_largest_matrix(cache: Path, tmp_path: Path) -> None:
    """All in one file: an lm_head of 300 MB more, merged, in float32 600; the peak may grow by what readers hold."""
    peaks = []
    for rows in (1000, 800_000):
        checkpoint = write_checkpoint(tmp_path / f"m{rows}")
        file = checkpoint / "model-00001-of-00001.safetensors"
        head = torch.zeros(rows, 192, dtype=torch.bfloat16)
        save_file({**load_file(file), "lm_head.weight": head}, file)
        adapter = write_per_expert(tmp_path / f"a{rows}", checkpoint, ["lm_head", "o_proj"])
        words = [f"model.path={checkpoint}", f"lora.path={adapter}", f"merge.path={tmp_path / f'out{rows}'}"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "action=merge", "model=auto", *words],
            env={**os.environ, "KT_LAUNCH_CACHE": str(cache)}, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
    blocks = 8 * merging.BLOCK_BYTES
    assert peaks[1] - peaks[0] < HELD_BYTES + blocks, peaks


def test_a_path_that_is_a_loop_of_links_is_named(launch: Launch, tmp_path: Path) -> None:
    checkpoint, loop = write_checkpoint(tmp_path / "m"), tmp_path / "loop"
    loop.symlink_to(loop)
    words = [f"model.path={checkpoint}", f"lora.path={write_adapter(tmp_path / 'a', checkpoint)}", f"merge.path={loop}"]
    ended = launch("action=merge", "model=auto", *words)
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err
    assert ended.errors[0].startswith(f"{loop}")


def test_float8_becomes_bfloat16_without_scales(tmp_path: Path) -> None:
    checkpoint, exact = write_float8(tmp_path / "m")
    adapter = write_adapter(tmp_path / "a", checkpoint)
    base = read_checkpoint(checkpoint, float8=True)
    imported = import_adapter(adapter, base).require_sound()
    merge(ExpertSource(base), imported, tmp_path / "out")
    after = all_tensors(tmp_path / "out")
    assert not any(name.endswith("_scale_inv") for name in after)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    delta = torch.from_numpy(imported.pairs["layers.1.experts.0.gate"].delta())
    assert torch.equal(after[name], (exact[name] + delta).to(torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read_checkpoint(tmp_path / "out")


def test_a_float8_checkpoint_is_refused_with_the_command_that_makes_it_servable(launch: Launch, tmp_path: Path) -> None:
    checkpoint, exact = write_float8(tmp_path / "m 8")
    refused = launch("action=plan", "model=auto", "lora=none", f"model.path={checkpoint}")
    assert refused.code == 2
    message = re.search(r"Use the bfloat16 checkpoint of this model; kt-launch (.*) makes it\.", refused.err)
    assert message is not None, refused.err
    made = launch(*shlex.split(message[1]))
    assert made.code == 0, made.err
    copy = tmp_path / "m 8-BF16"
    after = all_tensors(copy)
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    assert torch.equal(after[name], exact[name].to(torch.bfloat16))
    assert launch("action=plan", "model=auto", "lora=none", f"model.path={copy}").code == 0


def test_a_bfloat16_checkpoint_without_an_adapter_is_not_copied(launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    words = ["lora=none", f"model.path={checkpoint}", f"merge.path={tmp_path / 'out'}"]
    ended = launch("action=merge", "model=auto", *words)
    assert ended.code == 2
    assert f"lora: nothing to merge: no adapter is chosen, and {checkpoint} is not in float8." in ended.err
    assert not (tmp_path / "out").exists()


def test_the_command_and_its_second_run(launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", shards=2)
    templates = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    (checkpoint / templates[1]).parent.mkdir()
    for name in templates:
        (checkpoint / name).write_text(name)
    adapter = write_adapter(tmp_path / "a", checkpoint)
    words = ["action=merge", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}"]
    before = snapshot(checkpoint), snapshot(adapter)
    out = tmp_path / "out"
    ended = launch(*words, f"merge.path={out}")
    assert (ended.code, ended.out) == (0, f"made: {out}\n"), ended.err
    assert launch(*words, f"merge.path={out}").out == f"there already: {out}\n"
    assert [(out / name).read_text() for name in templates] == [*templates]
    assert before == (snapshot(checkpoint), snapshot(adapter))


def test_a_merge_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_model.errors import LaunchError

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


def _merge_over(last: Path, base: Checkpoint, imported: Imported, out: Path) -> None:
    """A merge whose last shard cannot be put in place. The state of this very merge keeps the folder from clearing."""
    from kt_model.weights import merging
    from kt_model.weights.staging import STATE

    source = ExpertSource(base)
    key = {
        "base": merging._base_key(base),
        "adapter": merging._adapter_key(imported),
        "version": merging.VERSION,
    }
    (last.parent / STATE).write_text(json.dumps({"key": key, "pieces": {}}))
    merge(source, imported, out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "merge.path: no folder given for the merged checkpoint. Set merge.path=/path/to/folder."),
        (["merge.path={base}"], "merge.path: {base} is inside {base}, which is read."),
        (["merge.path={base}/in"], "merge.path: {base}/in is inside {base}, which is read."),
        (
            ["merge.path={out}", "lora.adapters.b.path={adapter}"],
            "lora: only one adapter can be merged, but several are chosen: b, a.",
        ),
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
