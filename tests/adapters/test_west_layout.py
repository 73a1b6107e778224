"""The user's three commands on the user's own folders: a training run's folder with left-over pickles, two roots, and
experts that kt-kernel packed beside the model. The weights are tiny; the adapter reaches attention, shared experts and
routed ones. Three servers: the first command's, and one for each quantized method; the tests marked nightly start all.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from against_float32 import Reference, reference_of, require_match
from launching import Running, finish, launched, read_json
from tiny_checkpoints import write_checkpoint
from weight_files import write_kt_kernel_folder
from written import write_per_expert

from kt_launch.cli import main

pytestmark = pytest.mark.server
WEST = "Kllama2_deepseekV2_WEST_ALL"
COMMAND = ("model=deepseek_v2_lite", "lora=west_all")
METHODS = ("bf16", "int8", "int4")
SWEEP = ("-m", *COMMAND, f"kt.method={','.join(METHODS)}")
PLAN = ("action=plan", "format=json")
ATTENTION = [".q_proj", ".kv_a_proj_with_mqa", ".kv_b_proj", ".o_proj"]
EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
SHARED = [f".shared_experts.{part}_proj" for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ and loras/ as the user has them."""
    root = tmp_path_factory.mktemp("layout")
    model = write_checkpoint("deepseek_v2", root / "models" / "DeepSeek-V2-Lite-Chat")
    write_kt_kernel_folder(root / "models" / "DeepSeek-V2-Lite-Chat-CPU-weight-INT8")
    training = root / "loras" / WEST
    adapter = training / "checkpoint-133"
    write_per_expert(adapter, model, [*ATTENTION, *SHARED, *EXPERTS], seed=1, rank=8, size=0.1, lora_alpha=16)
    left_over = {"layers.1.experts.gate_lora_a": torch.ones(8, 8, 128)}
    torch.save(left_over, adapter / "adapter_model_converted.safetensors")
    torch.save(left_over, training / "moe_lora.pt")
    torch.save({}, adapter / "optimizer.pt")
    return root


def roots(layout: Path, **changes: Path | str) -> dict[str, str]:
    """Both variables, set; an empty one counts as unset."""
    found = {"KT_LAUNCH_MODELS": layout / "models", "KT_LAUNCH_LORAS": layout / "loras", **changes}
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def reference(layout: Path) -> Reference:
    adapter = layout / "loras" / WEST / "checkpoint-133"
    return reference_of(layout / "models" / "DeepSeek-V2-Lite-Chat", {"west_all": adapter})


@pytest.fixture(scope="module")
def served(layout: Path) -> Iterator[Running]:
    """The user's first command, both variables set."""
    with launched(*COMMAND, runs=layout / "runs", env=roots(layout)) as running:
        yield running


def test_the_users_command_serves_the_newest_checkpoint(served: Running, reference: Reference, layout: Path) -> None:
    for name in reference:
        require_match(served, reference, name)
    models = [one["id"] for one in served.client.get("/v1/models").json()["data"]]
    assert models[0] == "deepseek-v2-lite"
    resolved = read_json(served.run_folder / "plan.json")["resolved"]
    checkpoint = layout / "loras" / WEST / "checkpoint-133"
    assert resolved["lora.west_all.path"]["value"] == str(checkpoint)
    assert resolved["lora.west_all.checkpoint"]["value"] == "checkpoint-133"
    require_proven(read_json(served.run_folder / "proof.json"), "bf16")
    parts = dict(part.split(" on ") for part in resolved["lora.west_all.reaches"]["value"].split(", "))
    counts = {place: int(count.partition(" ")[0]) for count, place in parts.items()}
    assert {"attention", "shared experts", "routed experts"} <= counts.keys()
    assert counts["routed experts"] == resolved["lora.west_all.expert_pairs"]["value"] == 2 * len(EXPERTS)
    (message,) = (line for line in (layout / "runs" / "stderr.txt").read_text().splitlines() if "not read" in line)
    names = "adapter_model_converted.safetensors, ../moe_lora.pt"
    assert message == (
        f"warning: lora.west_all: {names} look like weights and are not read; the adapter is adapter_model.safetensors"
    )


def require_proven(proof: dict[str, Any], method: str) -> None:
    """By this method, with an adapter that acts."""
    assert proof["method"] == method
    assert proof["difference"]["west_all"] > 1
    assert {"base", "adapter"} <= proof["reference_error"].keys()
    assert proof["content"]["whole_model"]["checked"].keys() == {"base", "west_all"}


def one_root(layout: Path, folder: Path) -> dict[str, str]:
    """Adapters that lie below the models' root need no second variable."""
    folder.mkdir()
    for each in [*(layout / "models").iterdir(), *(layout / "loras").iterdir()]:
        (folder / each.name).symlink_to(each)
    return roots(layout, KT_LAUNCH_MODELS=folder, KT_LAUNCH_LORAS="")


def test_with_one_root_and_threads_of_ones_own(layout: Path, tmp_path: Path) -> None:
    """It is planned as with two, but for the threads."""
    found = []
    for env, words in ((roots(layout), ()), (one_root(layout, tmp_path / "both"), ("kt.cpuinfer=1",))):
        code, out, message = finish(*COMMAND, *words, *PLAN, runs=tmp_path / "runs", env=env)
        assert code == 0, message
        found.append({key: one["value"] for key, one in json.loads(out)["resolved"].items()})
    both, one = found
    assert one["kt.cpuinfer"] == 1
    for key in ("model.path", "lora.west_all.path"):
        assert Path(one[key]).parents[0 if key == "model.path" else 1] == tmp_path / "both"
        assert Path(one[key]).resolve() == Path(both[key]).resolve()
    assert one["lora.west_all.reaches"] == both["lora.west_all.reaches"]


@pytest.mark.nightly
def test_a_server_with_one_root_and_threads_of_ones_own(
    served: Running, reference: Reference, layout: Path, tmp_path: Path
) -> None:
    assert served.stop() == 130
    env = one_root(layout, tmp_path / "both")
    with launched(*COMMAND, "kt.cpuinfer=1", runs=tmp_path / "runs", env=env) as running:
        for name in reference:
            require_match(running, reference, name)
        assert read_json(running.run_folder / "plan.json")["resolved"]["kt.cpuinfer"]["value"] == 1


def proofs(out: str) -> list[dict[str, Any]]:
    """What was proven in each run that the output names."""
    folders = [Path(line.removeprefix("run: ")) for line in out.splitlines() if line.startswith("run: ")]
    return [json.loads((folder / "proof.json").read_text()) for folder in folders]


@pytest.mark.parametrize(
    ("typed", "proven"),
    [((*SWEEP, "action=plan"), METHODS[1:]), pytest.param(SWEEP, METHODS, marks=pytest.mark.nightly)],
    ids=["planned", "served"],
)
def test_the_sweep_proves_each_method_after_what_it_tells_to_do(
    typed: tuple[str, ...], proven: tuple[str, ...], layout: Path, tmp_path: Path
) -> None:
    """As typed, bfloat16 comes up and int8 and int4 say what makes their experts; then these two come up as well."""
    runs, env = tmp_path / "sweep", roots(layout)
    code, out, message = finish(*typed, runs=runs, env=env)
    assert code == 2, message
    before = proofs(out)
    lines = [line for line in message.splitlines() if " Run kt-launch " in line]
    packed = layout / "models" / "DeepSeek-V2-Lite-Chat-CPU-weight-INT8"
    assert [str(packed) in line for line in lines] == [True, False]
    for line, method in zip(lines, METHODS[1:], strict=True):
        command = line.partition(" Run ")[2].removesuffix(", or add kt.prepare=true.")
        assert command == f"kt-launch quantize model=deepseek_v2_lite kt.method={method}"
        code, _, errors = finish(*shlex.split(command)[1:], runs=runs, env=env)
        assert code == 0, errors
    code, out, message = finish(*SWEEP[:-1], f"kt.method={','.join(METHODS[1:])}", runs=runs, env=env)
    assert code == 0, message
    for proof, method in zip([*before, *proofs(out)], proven, strict=True):
        require_proven(proof, method)


@pytest.mark.parametrize("command", [COMMAND, (*COMMAND, "kt.cpuinfer=1"), SWEEP], ids=" ".join)
def test_without_roots_and_with_wrong_ones_nothing_starts(
    command: tuple[str, ...],
    layout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = 3 if command == SWEEP else 1

    def call(env: dict[str, str]) -> str:
        for name, value in {**env, "KT_LAUNCH_RUNS": str(tmp_path), "KT_LAUNCH_CACHE": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        assert main(list(command)) == 2
        out, message = capfd.readouterr()
        assert out == ""
        return message

    message = call(roots(layout, KT_LAUNCH_MODELS="", KT_LAUNCH_LORAS=""))
    assert message.count("Set KT_LAUNCH_MODELS, or set model.path=/path/to/folder.") == jobs
    assert message.count("Set KT_LAUNCH_LORAS (or KT_LAUNCH_MODELS") == jobs
    message = call(roots(layout, KT_LAUNCH_LORAS=layout / "models"))
    assert message.count(f"no folder {WEST} in {layout / 'models'} (environment: KT_LAUNCH_LORAS=") == jobs
