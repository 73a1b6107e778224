"""Every mistake a user can make: its message names the key, what was expected and what to do, and the code is 2."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import EXPERTS, HIDDEN, RANK, adapter_tensors, write_adapter, write_checkpoint

from kt_launch.machine.ports import probe_port

Launch = Callable[..., Any]


def said(ended: Any) -> list[str]:
    """The mistakes, one a line."""
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    return [line.removeprefix("error: ") for line in ended.err.splitlines() if line.startswith("error: ")]


TYPED = {
    "kt.cpuinfr=3": "kt.cpuinfr: no such key or group. Did you mean kt.cpuinfer=3?",
    "cpuinfer=3": "cpuinfer: no such key or group. Did you mean kt.cpuinfer=3?",
    "server.cpuinfer=3": "server.cpuinfer: no such key or group. Did you mean kt.cpuinfer=3?",
    "server.detach=true": "server.detach: no such key or group. Did you mean detach=true?",
    "loar=none": "loar: no such key or group. Did you mean lora=none?",
    "lora.alpha=32": "lora.alpha: no such key or group. Leave it out: an adapter is served with what its adapter_conf",
    "lora_dropout=0.1": "lora_dropout: no such key or group. Leave it out: an adapter is served with what its",
    "xyzzy=1": "xyzzy: no such key or group. kt-launch --help lists them.",
    "lora=west_al": "lora: no preset named west_al, expected one of demo_west, none, west_all. "
    "Did you mean lora=west_all?",
    "lora=/some/where": "lora: no folder /some/where, but an adapter folder is expected. Set lora=/path/to/folder.",
    "lora=[/a/x,/b/x]": "lora: two adapters are named x. Name one yourself: {name: other, path: /b/x}.",
    "lora=[{name: x, path: /a},/b/x]": "lora: two adapters are named x. Give each its own name.",
    "lora=xyz": "lora: no preset named xyz, expected one of demo_west, none, west_all. "
    "For a folder of your own set lora=/path/to/xyz.",
    "kt=fp8": "kt: no preset named fp8, expected one of auto, bf16, int4, int8. "
    "Your own presets go into <folder>/kt/fp8.yaml with --config-dir <folder>.",
    "kt.cpuinfer=(3": """kt.cpuinfer: the value (3 cannot be read. Put it in quotes: "kt.cpuinfer='...'".""",
    "kt.cpuinfer=1,2": "kt.cpuinfer: 1,2 are several values, but a single launch takes one. "
    "Add -m to run one after another.",
    "lora=none,west_all": "lora: none,west_all are several values, but a single launch takes one. "
    "Add -m to run one after another, or set lora=[none,west_all] for both.",
    "kt.cpuinfer=many": "kt.cpuinfer: got 'many', but input should be a valid integer. "
    "Meaning: Threads that compute experts; the usable physical cores when not given, less some with server.tp on",
    "kt.cpuinfer=1.5": "kt.cpuinfer: got 1.5, but input should be a valid integer. "
    "Meaning: Threads that compute experts; the usable physical cores when not given, less some with server.tp on",
    "kt.method=FP8": "kt.method: got 'FP8', but input should be 'bf16', 'int8' or 'int4'. "
    "Meaning: Number format of the routed experts on the CPU; ",
    "server.port=70000": "server.port: got 70000, but input should be less than or equal to 65535. "
    "Meaning: Port to listen on; 0 takes a free one.",
    "kt.method=int8": "kt.method: int8 needs kt.weight_path (no folder given). "
    "Run kt-launch quantize ",
    "kt=int4": "kt.method: int4 needs kt.weight_path (no folder given). Run kt-launch quantize ",
    "kt.num_gpu_experts=8": "kt.num_gpu_experts: 8, but 0 to 3 are expected. Set kt.num_gpu_experts=0.",
    "kt.num_gpu_experts=-1": "kt.num_gpu_experts: -1, but 0 to 3 are expected. Set kt.num_gpu_experts=0.",
    "kt.num_gpu_experts=many": "kt.num_gpu_experts: got 'many', but input should be a valid integer or auto. ",
    "kt.expert_profile=/no/such": "kt.expert_profile: /no/such: ",
    "kt.threadpool_count=0": "kt.threadpool_count: 0 pools for ",
    "model.name=a:b": "model.name: 'a:b' cannot be used in a request; letters, digits and . _ - / are expected. "
    "Set model.name=<a plain name>.",
    "lora.name=mine": "lora.name: mine is not the name of an adapter. Set lora.path=/path/to/folder as well.",
    "lora.path=/no/such": "lora.path: no folder /no/such, but an adapter folder is expected. "
    "Set lora.path=/path/to/folder.",
    "model.path=/no/such": "model.path: no folder /no/such, but a checkpoint folder is expected. "
    "Set model.path=/path/to/folder.",
    "kt.weight_path=/other": "kt.weight_path: bf16 reads the experts from model.path, not from /other. "
    "Leave kt.weight_path out.",
    "server.extra_args=[--port,1]": "server.extra_args: --port is set by the plan. "
    "Set server.port=<value> instead.",
    "server.extra_args=[--log-level debug]": "server.extra_args: '--log-level debug' is one word, but a flag and its "
    "value are two. Separate them by a comma: server.extra_args=[--log-level,debug].",
    "server.extra_args=[--dtype,half]": "server.extra_args: --dtype is set by the plan. Leave it out.",
    "server.extra_args=[--model,/x]": "server.extra_args: --model means --model-path, which the plan sets. "
    "Set model.path=<value> instead.",
    "server.extra_args=[--lora-paths,x=/y]": "server.extra_args: adapters given to SGLang by --lora-paths are neither "
    "checked nor proven. Set lora.path=/path/to/folder.",
    "server.context_length=513": "server.context_length: 513 tokens, but the model was made for 512. "
    "Set server.context_length=512; with ",
    "server.max_total_tokens=10": "server.max_total_tokens: got 10, but input should be greater than or equal to 64. ",
    "kt=[int8,auto]": "kt: [int8,auto] are several presets, but one is expected. Set kt=<one of them>.",
    "merge=/x": "merge: it is a section of keys and has no value itself. Did you mean merge.path=/x?",
    "plan.format=json": "plan.format: no such key or group. Did you mean format=json?",
    "paths=/x": "paths: it is a section of keys and has no value itself. "
    "Its keys are paths.models, paths.loras, paths.runs.",
    "server/auto=1": "server/auto: no such key or group. ",
    "lora.adapters.mine.pth=/x": "lora.adapters.mine.pth: no such key. ",
    "kt=8": "kt: no preset named 8, expected one of auto, bf16, int4, int8. ",
    "=3": "=3: key=value is expected. ",
    "": "an empty word: an action or key=value is expected. ",
    "lora=": "lora: no preset given, expected one of demo_west, none, west_all. "
    "Set lora=<one of them>, or leave it out; a shell's variable that is not set gives nothing.",
    "lora=null": "lora: no preset given, expected one of ",
    "kt.cpuinfer": "kt.cpuinfer: an action or key=value is expected. ",
    "kt.cpuinfer = 2": "kt.cpuinfer: 'kt.cpuinfer = 2' has spaces in it, but key=value is expected. "
    "Set kt.cpuinfer=2.",
    "kt.method=bfloat16": "kt.method: got 'bfloat16', but input should be 'bf16', 'int8' or 'int4'. "
    "Did you mean kt.method=bf16? ",
    "server.device=gpu": "server.device: got 'gpu', but input should be 'auto', 'cpu' or 'cuda'. "
    "Did you mean server.device=cuda? ",
    "format=JSN": "format: got 'JSN', but input should be 'text' or 'json'. Did you mean format=json? ",
    "bench.concurrency=4": "bench.concurrency: got 4, but input should be a valid list. "
    "Did you mean bench.concurrency=[4]? ",
    "bench.concurrency=[0]": "bench.concurrency.0: got 0, but input should be greater than or equal to 1. "
    "Meaning: Concurrent requests",
    "server.extra_args=--log-level debug": "server.extra_args: got '--log-level debug', but input should be a valid "
    "list. Did you mean server.extra_args=[--log-level,debug]? ",
    "server.host=no.such.host.invalid": "server.host: cannot listen on no.such.host.invalid (",
    "server.host=192.0.2.1": "server.host: cannot listen on 192.0.2.1 (Cannot assign requested address). "
    "Use an address of this machine: 127.0.0.1, or 0.0.0.0 for all of its addresses.",
    "server.host=0.0.0.0": "server.host: 0.0.0.0 is open to other machines, and no key is required. "
    "Set server.api_key=env:KT_LAUNCH_API_KEY and set it, or server.open=true to let everyone in.",
    "server.api_key=sk-of-mine": "server.api_key: the key itself would be recorded with the run; expected env:NAME or "
    "file:/path/to/file. Set server.api_key=env:KT_LAUNCH_API_KEY and set that variable.",
    "server.origins=[example.com]": "server.origins: 'example.com' is not an origin, expected scheme, host and port "
    "as a browser sends them. Set server.origins=[https://chat.example.com].",
    "server.extra_args=null": "server.extra_args: got null, but input should be a valid list. Did you mean "
    "server.extra_args=[]? ",
    "~server.port": "server.port: a key cannot be deleted. Leave it out.",
    "~kt.cpuinfer": "kt.cpuinfer: a key cannot be deleted. Leave it out, or set kt.cpuinfer=null.",
    "paths.models=${oc.env:NO_SUCH_VARIABLE}": "paths.models: ${oc.env:NO_SUCH_VARIABLE} stands for the environment "
    "variable NO_SUCH_VARIABLE, which is not set. Run export NO_SUCH_VARIABLE=<value> first, or "
    "set paths.models=<value>.",
    "kt.cpuinfer=${server.prt}": "kt.cpuinfer: ${server.prt} stands for the value of server.prt, but there is no such "
    "key. kt-launch --help lists the keys.",
    "model.path=${env:HOME}": "model.path: there is no resolver named env, expected ${oc.env:NAME} or ${section.key}. "
    "Set model.path=<value>.",
    "server.extra_args=--a,--b": "server.extra_args: --a,--b are several values, but one list is expected. "
    "Set server.extra_args=[--a,--b].",
    "server.extra_args=[--log-level": "server.extra_args: the value [--log-level cannot be read. "
    'Set "server.extra_args=[--log-level]", values separated by commas.',
    "model.path=???": "model.path: ??? stands for a value that must be given. Set model.path=<value>.",
}  # fmt: skip


@pytest.mark.parametrize("override", TYPED)
def test_a_mistake_in_what_is_typed(override: str, plan: Launch) -> None:
    assert any(line.startswith(TYPED[override]) for line in said(plan(override))), plan(override).err


def test_an_unknown_choice_of_model(launch: Launch) -> None:
    assert "Did you mean model=deepseek_v2_lite?" in said(launch("action=plan", "model=deepseek_v2_lit"))[0]
    (line,) = said(launch("action=plan", "model=/my/model"))
    assert (
        line == "model.path: no folder /my/model, but a checkpoint folder is expected. Set model.path=/path/to/folder."
    )


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_threads_that_the_machine_does_not_have(count: int, plan: Launch) -> None:
    cores = plan().value("kt.cpuinfer")
    (line,) = said(plan(f"kt.cpuinfer={count}"))
    assert line.startswith(f"kt.cpuinfer: {count} threads, but 1 to ")
    assert line.endswith(f"Set kt.cpuinfer={cores}, or leave it out.")


def test_a_port_in_use_names_its_owner(plan: Launch, busy_port: int) -> None:
    (line,) = said(plan(f"server.port={busy_port}"))
    assert line.startswith(f"server.port: {busy_port} on 127.0.0.1 cannot be used: process {os.getpid()} (")
    assert line.endswith("Stop it, or set server.port=0 for a free port.")


def test_a_metrics_port_in_use_or_the_servers_own(plan: Launch, busy_port: int) -> None:
    (line,) = said(plan(f"server.metrics_port={busy_port}"))
    assert line.startswith(f"server.metrics_port: {busy_port} on 127.0.0.1 cannot be used: process {os.getpid()} (")
    free = probe_port("127.0.0.1", 0).number
    (line,) = said(plan(f"server.port={free}", f"server.metrics_port={free}"))
    assert line == f"server.metrics_port: {free} is server.port too. Set server.metrics_port=0 for a free port."


def test_two_errors_at_once(plan: Launch) -> None:
    lines = said(plan("kt.cpuinfer=-1", "lora.path=/no/such", "server.prt=1", "kt.threadpool_count=x"))
    assert [line.partition(":")[0] for line in lines] == [
        "server.prt", "kt.threadpool_count", "lora.path", "kt.cpuinfer",
    ]  # fmt: skip


def test_all_references_that_lead_nowhere_at_once(launch: Launch) -> None:
    unset = ("model.path=${oc.env:NO_1}", "lora.adapters.mine.path=${oc.env:NO_2}", "kt.cpuinfr=2")
    lines = said(launch("action=plan", "model=auto", *unset))
    assert [line.partition(":")[0] for line in lines] == ["kt.cpuinfr", "model.path", "lora.adapters.mine.path"]


def test_what_a_typing_mistake_causes_is_not_told_twice(launch: Launch) -> None:
    (line,) = said(launch("action=plan", "model=auto", "modle.path=/x", "server=cpu"))
    assert "Did you mean model.path=/x?" in line


def test_no_checkpoint_at_all(launch: Launch) -> None:
    assert said(launch("action=plan", "model=auto")) == ["model.path: no folder given. Set model.path=/path/to/folder."]


def test_a_preset_without_a_root_for_its_folder(launch: Launch) -> None:
    (line,) = said(launch("action=plan", "model=deepseek_v2_lite"))
    assert line == (
        "model.path: the folder DeepSeek-V2-Lite-Chat is expected below a root, but none is given. "
        "Set KT_LAUNCH_MODELS, or set model.path=/path/to/folder."
    )


FLAGS = {
    "--multi-run": "Did you mean --multirun?",
    "--plan": "Did you mean kt-launch plan?",
    "--dry-run": "Did you mean kt-launch plan?",
    "--kt.cpuinfer=2": "Keys have no dashes: kt.cpuinfer=2",
    "--kt-cpuinfer 60": "Keys have no dashes: kt.cpuinfer=60",
    "--model-path models/X": "Keys have no dashes: model.path=models/X",
    "--kt-moe-sft-method bf16": "Keys have no dashes: kt.method=bf16",
    "--kt-moe-lora-rank 8": "Leave it out: adapter_config.json has it.",
    "--lora-paths /x": "Keys have no dashes: lora.path=/x",
    "--port 30000": "Keys have no dashes: server.port=30000",
    "--trust-remote-code": "Keys have no dashes: model.trust_remote_code=true",
    "--tp-size 2": "Keys have no dashes: server.tp=2",
    "--seed 1": "kt-launch --help lists the flags; for one of SGLang's set server.extra_args=[--seed,1].",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_an_unknown_flag(flag: str, launch: Launch) -> None:
    name = flag.partition(" ")[0].partition("=")[0]
    assert said(launch(*flag.split())) == [f"{name}: no such flag. {FLAGS[flag]}"]


def test_all_flags_of_a_command_line_for_sglang_are_told_at_once(launch: Launch) -> None:
    words = "--model-path /x --kt-weight-path /y --kt-moe-lora-path /z --kt-num-gpu-experts 0 --kt-cpuinfer 60"
    meant = ["model.path=/x", "kt.weight_path=/y", "lora.path=/z", "kt.num_gpu_experts=0", "kt.cpuinfer=60"]
    assert [line.partition("dashes: ")[2] for line in said(launch(*words.split()))] == meant


PIECES = {
    "kt.cpuinfer = 2": "kt.cpuinfer=2",
    "kt.cpuinfer =2": "kt.cpuinfer=2",
    "kt.cpuinfer= 2": "kt.cpuinfer=2",
    "kt.cpuinfer 2": "kt.cpuinfer=2",
    "model.path=/my models/one": '"model.path=/my models/one"',
    "action plan": "action=plan",
    "lora demo_west": "lora=demo_west",
}


@pytest.mark.parametrize("typed", PIECES)
def test_what_a_shell_cut_into_pieces(typed: str, launch: Launch) -> None:
    (line,) = said(launch(*typed.split(), "server.port=0"))
    assert line.endswith(f"{typed!r} has spaces in it, but key=value is expected. Set {PIECES[typed]}.")


def test_a_file_where_a_folder_is_expected(plan: Launch, launch: Launch, checkpoint: Path, adapter: Path) -> None:
    (line,) = said(plan(f"lora.path={adapter}/adapter_model.safetensors"))
    assert line.endswith(f"is a file, but an adapter folder is expected. Set lora.path={adapter}.")
    (line,) = said(launch("action=plan", "model=auto", f"model.path={checkpoint}/config.json"))
    assert line.endswith(f"is a file, but a checkpoint folder is expected. Set model.path={checkpoint}.")


def test_a_key_typed_as_a_flag(launch: Launch) -> None:
    assert said(launch("--model", "demo")) == ["--model: no such flag. Keys have no dashes: model=demo"]
    assert said(launch("--kt-cpuinfer", "4")) == ["--kt-cpuinfer: no such flag. Keys have no dashes: kt.cpuinfer=4"]
    assert said(launch("--port=8000")) == ["--port: no such flag. Keys have no dashes: server.port=8000"]


def test_a_config_folder_that_is_not_there(launch: Launch) -> None:
    (line,) = said(launch("--config-dir", "/no/such", "action=plan"))
    assert line.startswith("--config-dir: no folder /no/such.")


def test_mistakes_in_a_preset_are_told_with_its_file(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own/server").mkdir(parents=True)
    file = tmp_path / "own/server/mine.yaml"
    file.write_text("prot: 1\nrestarts: often\n")
    lines = said(launch("--config-dir", str(tmp_path / "own"), "action=plan", "server=mine"))
    assert lines[0].startswith(
        f"server.restarts: got 'often', but input should be a valid integer (preset file: {file}). Meaning: How often "
    )
    assert lines[1] == f"server.prot: no such key (preset file: {file}). Did you mean server.port?"


def test_a_key_in_the_wrong_section_of_a_preset_is_named_where_it_stands(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own/server").mkdir(parents=True)
    file = tmp_path / "own/server/mine.yaml"
    file.write_text("detach: true\n")
    (line,) = said(launch("--config-dir", str(tmp_path / "own"), "action=plan", "server=mine"))
    assert line == f"server.detach: no such key (preset file: {file}). Did you mean detach?"


def test_a_preset_that_is_no_yaml(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("path: [unclosed\n")
    (line,) = said(launch("--config-dir", str(tmp_path / "own"), "action=plan", "model=mine"))
    assert line.startswith(f"{tmp_path / 'own/model/mine.yaml'}: invalid YAML at line 2: expected ',' or ']'")


# ---- checkpoints


def refused(launch: Launch, folder: Path) -> str:
    (line,) = said(launch("action=plan", "model=auto", "server=cpu", f"model.path={folder}"))
    return str(line)


def test_a_folder_without_config(launch: Launch, tmp_path: Path) -> None:
    assert refused(launch, tmp_path) == f"model.path: {tmp_path} has no config.json. Choose a folder that has one."


def test_a_dense_model(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    line = refused(launch, tmp_path)
    assert "has model_type llama, which is not a supported Mixture-of-Experts family" in line
    assert "Supported are deepseek_v2," in line


def test_a_config_without_its_numbers(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"n_routed_experts": None}))
    assert "n_routed_experts is None, but a positive integer is expected" in refused(launch, folder)


def test_a_quantized_checkpoint(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", quantization_config={"quant_method": "fp8"})
    assert "the checkpoint is quantized (fp8). Use the bfloat16 checkpoint" in refused(launch, folder)


def test_a_checkpoint_with_fewer_experts_than_it_announces(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"n_routed_experts": EXPERTS + 1}))
    assert f"no tensor model.layers.1.mlp.experts.{EXPERTS}.gate_proj.weight" in refused(launch, folder)


def test_a_checkpoint_of_other_widths_than_it_announces(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"hidden_size": 48}))
    assert "has shape [16, 32], but config.json declares [16, 48]" in refused(launch, folder)


def test_a_checkpoint_with_a_missing_shard(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    index = {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"1 files that {folder / 'model.safetensors.index.json'} names are missing: model-00002-of" in refused(
        launch, folder
    )


def test_a_truncated_checkpoint(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file}: truncated: " in refused(launch, folder)


def test_a_checkpoint_of_pickles(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no safetensors files. Save the checkpoint with safe_serialization=True." in refused(launch, folder)


# ---- adapters


def adapter_mistakes(plan: Launch, folder: Path) -> list[str]:
    return said(plan(f"lora.path={folder}"))


def test_an_adapter_without_its_config(plan: Launch, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    assert adapter_mistakes(plan, folder) == [
        f"lora.path: {folder} has no adapter_config.json. Choose a folder that has one."
    ]


def test_an_adapter_without_weights(plan: Launch, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    assert f"lora.path: {folder} has no adapter_model.safetensors." in adapter_mistakes(plan, folder)[0]


@pytest.mark.parametrize("name", ["adapter_model.bin", "moe_lora.pt"])
def test_an_adapter_that_is_a_pickle(name: str, plan: Launch, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / name)
    (line,) = adapter_mistakes(plan, folder)
    assert f"has {name}, a pickle, but adapter_model.safetensors is expected. Save the adapter again" in line


def test_an_adapter_that_is_truncated(plan: Launch, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file}: truncated: " in adapter_mistakes(plan, folder)[0]


def test_a_without_b(plan: Launch, tmp_path: Path) -> None:
    tensors = adapter_tensors()
    name = "base_model.model.model.layers.1.mlp.experts.0.gate_proj"
    del tensors[f"{name}.lora_B.weight"]
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", tensors))
    assert line.startswith("lora.path: A without B: model.layers.1.mlp.experts.0.gate_proj.")


REFUSED = {
    "use_dora": (True, "use_dora (DoRA)"),
    "lora_bias": (True, "lora_bias (biases on B)"),
    "bias": ("all", "bias=all (trained biases)"),
    "modules_to_save": (["lm_head"], "modules_to_save (whole modules"),
    "layer_replication": ([[0, 2]], "layer_replication (replicated layers)"),
    "init_lora_weights": ("pissa", "init_lora_weights=pissa (a changed base model)"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_an_adapter_may_not_ask_for(key: str, plan: Launch, tmp_path: Path) -> None:
    value, message = REFUSED[key]
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", None, **{key: value}))
    assert line.startswith("lora.path: adapter_config.json asks for something that is not supported: ")
    assert message in line


def test_an_adapter_that_is_no_lora(plan: Launch, tmp_path: Path) -> None:
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", None, peft_type="IA3"))
    assert line == "lora.path: peft_type is IA3, but LORA is expected. Train a LoRA adapter."


def test_an_adapter_with_an_unknown_key(plan: Launch, tmp_path: Path) -> None:
    tensors = adapter_tensors() | {"something.else": np.zeros(2, np.float32)}
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", tensors))
    assert line.startswith(
        "lora.path: 1 unknown keys in adapter_model.safetensors: something.else. Expected are names like"
    )


def test_an_adapter_of_another_rank_than_it_says(plan: Launch, tmp_path: Path) -> None:
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", None, r=RANK + 1))
    assert line.startswith("lora.path: ranks that disagree with adapter_config.json: ")
    assert f"has A [{RANK}, {HIDDEN}]" in line
    assert f"expected rank {RANK + 1}" in line


def moved(old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): tensor for name, tensor in adapter_tensors(layers=(1,)).items()}


def test_an_adapter_of_other_dimensions(plan: Launch, tmp_path: Path) -> None:
    wide = {
        name: np.zeros((tensor.shape[0], tensor.shape[1] * (2 if "lora_A" in name else 1)), np.float32)
        for name, tensor in adapter_tensors().items()
    }
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", wide))
    assert "dimensions that do not fit the base" in line
    assert "and 21 more" in line


def test_an_adapter_of_more_layers(plan: Launch, tmp_path: Path) -> None:
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", moved("layers.1.", "layers.9.")))
    assert "layers that the base, which has 3, does not have: model.layers.9." in line


def test_an_adapter_on_experts_of_a_dense_layer(plan: Launch, tmp_path: Path) -> None:
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", moved("layers.1.", "layers.0.")))
    assert "routed experts in layers that have none in the base: model.layers.0." in line


def test_an_adapter_of_more_experts(plan: Launch, tmp_path: Path) -> None:
    tensors = adapter_tensors() | moved("experts.3.", "experts.64.")
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", tensors))
    assert f"experts that the base, which has {EXPERTS} a layer, does not have: model.layers.1.mlp.experts.64." in line


def test_an_adapter_on_modules_the_base_has_not(plan: Launch, tmp_path: Path) -> None:
    (line,) = adapter_mistakes(plan, write_adapter(tmp_path / "a", moved("gate_proj", "gait_proj")))
    assert "8 modules that the base does not have in adapter_model.safetensors: " in line
    assert "layers.1.mlp.experts.0.gait_proj.lora_A.weight" in line


def test_an_adapter_that_leaves_some_experts_out(plan: Launch, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in adapter_tensors().items() if ".experts.2." not in name}
    folder = write_adapter(tmp_path / "a", tensors)
    (line,) = adapter_mistakes(plan, folder)
    assert line == (
        "lora.path: 6 expert projections of the layers that it changes have no LoRA weights. "
        "Set lora.allow_missing=true to leave these as they are."
    )
    assert plan(f"lora.path={folder}", "lora.allow_missing=true").code == 0


def test_a_room_smaller_than_the_adapters_rank(plan: Launch, adapter: Path) -> None:
    (line,) = said(plan(f"lora.path={adapter}", "lora.max_rank=1"))
    assert line == "lora.max_rank: 1, but an adapter has rank 2. Set lora.max_rank=2."


def test_a_pickle_in_disguise_is_named(plan: Launch, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    file.unlink()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    (line,) = adapter_mistakes(plan, folder)
    assert line.startswith(f"lora.path: {file}: a torch pickle (zip archive), but a safetensors file is expected.")


def test_a_runs_folder_that_cannot_be_made(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = ("model=auto", "server=cpu", f"model.path={checkpoint}", f"paths.runs={tmp_path / 'file' / 'runs'}")
    assert said(launch(*own)) == [below_a_file("paths.runs", tmp_path)]


def below_a_file(key: str, folder: Path) -> str:
    """What is said of folder/file/runs, where file is one."""
    problem = f"{folder / 'file' / 'runs'} cannot be made, since {folder / 'file'} is a file, but a folder is expected"
    return f"{key}: {problem}. Set {key}=/path/to/folder."


def test_a_bench_whose_requests_no_server_would_take(launch: Launch, checkpoint: Path) -> None:
    own = ("action=bench", "model=auto", "server=cpu", f"model.path={checkpoint}", "bench.input_tokens=481")
    assert said(launch(*own)) == [
        "bench.input_tokens: 481 tokens and 32 of the answer, but a request has at most 512. "
        "Set bench.input_tokens=256 bench.output_tokens=32, or a larger server.context_length."
    ]


def test_a_bench_of_replicas(launch: Launch, checkpoint: Path) -> None:
    own = ("action=bench", "model=auto", "server=cpu", f"model.path={checkpoint}", "kt.cpuinfer=1")
    assert said(launch(*own, "server.replicas=2")) == [
        "server.replicas: 2 replicas, but a bench measures one server. "
        "Leave it out, or set server.dp for copies in one server."
    ]


@pytest.mark.parametrize("key", ["paths.runs", "sweep.folder"])
def test_a_sweep_where_nothing_can_be_written(key: str, launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    own = ("model=auto", "server=cpu", f"model.path={checkpoint}", f"{key}={tmp_path / 'file' / 'runs'}")
    (line,) = said(launch("-m", "kt.cpuinfer=1,2", *own))
    if key == "paths.runs":
        assert line == below_a_file(key, tmp_path)
        return
    assert line.startswith(f"sweep.folder: cannot keep a sweep in {tmp_path / 'file' / 'runs'}")
    assert line.endswith("(Not a directory). Set sweep.folder=/a/folder/you/can/write, or set KT_LAUNCH_RUNS.")


@pytest.mark.parametrize("typed", ["lora=west", "lora=[demo_west,west]"])
def test_a_folder_below_a_root_is_named_by_its_path(
    typed: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presets are named, folders are paths; whoever set the roots may type a folder's name all the same."""
    for folder in ("models/mine", "models/west", "adapters/west"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("KT_LAUNCH_MODELS", str(tmp_path / "models"))
    (line,) = said(launch("plan", typed))
    assert line.endswith(f" Did you mean lora={tmp_path}/models/west?")
    monkeypatch.setenv("KT_LAUNCH_LORAS", str(tmp_path / "adapters"))
    (line,) = said(launch("plan", typed))
    assert line.endswith(f" Did you mean lora={tmp_path}/adapters/west?")
    (line,) = said(launch("plan", "model=mine"))
    assert line.endswith(f"demo. Did you mean model={tmp_path}/models/mine?")


@pytest.mark.parametrize(("typed", "meant"), [("start", "serve"), ("ps", "runs"), ("kill", "stop")])
def test_another_programs_word_for_an_action(typed: str, meant: str, launch: Launch) -> None:
    assert said(launch(typed)) == [f"{typed}: an action or key=value is expected. Did you mean kt-launch {meant}?"]
