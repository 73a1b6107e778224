"""Two ranks of tensor parallelism on a CPU: experts, adapters on everything and a tied head are cut alike, whatever the
expert width; or the first rank has the experts, whole. Where they are split, each rank brings its part of them to its
device for long prompts, as on GPUs, of which a plugin of SGLang's says that there are some."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from endings import require_end_without_launcher
from float32_model import FAR_OFF, LONG, Float32Model, long_errors
from launching import Running, launched, read_json
from other_plugin import write_plugin
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from written import write_per_expert

from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.importer import import_adapter
from kt_model.weights.merging import merge

pytestmark = pytest.mark.server
RANKS = "server.tp=2"
PARTS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = [f".experts.{expert}.{part}" for expert in range(8) for part in PARTS]
DENSE = [f".{place}.{part}" for place in ("mlp", "shared_experts") for part in PARTS]
ATTENTION = [".q_proj", ".kv_a_proj_with_mqa", ".kv_b_proj", ".o_proj"]
ADAPTERS = {"experts": EXPERTS, "everything": [*EXPERTS, *DENSE, *ATTENTION, "embed_tokens", "lm_head"]}
LONGER = LONG + 1
"""Tokens of a prompt from which on experts are brought."""
BRINGING = f"""
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", bring, HookType.AFTER)

def bring(result, *_, **__):
    import torch
    from kt_sglang.prompts import prefill
    prefill.start({{"tokens": {LONGER}}}, torch.device("cpu"))
    return result
"""
MOONLIGHT: dict[str, Any] = {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "moe_intermediate_size": 8,
    "intermediate_size": 38,
    "tie_word_embeddings": True,
}


@dataclass
class Model:
    """What both servers serve: a checkpoint, the same in float32, and adapters."""

    checkpoint: Path
    exact: Path
    adapters: dict[str, Path]
    float32: dict[str | None, Float32Model] = field(default_factory=dict)
    """By adapter; they keep what they have computed."""

    def with_adapter(self, adapter: str | None) -> Float32Model:
        """In float32, merged with it."""
        if adapter not in self.float32:
            exact, base = self.exact, read_checkpoint(self.exact)
            if adapter:
                exact = self.exact.with_name(f"with {adapter}")
                assert merge(ExpertSource(base), import_adapter(self.adapters[adapter], base).require_sound(), exact)
            self.float32[adapter] = Float32Model(exact)
        return self.float32[adapter]


@dataclass
class Served:
    """A running server, and which ranks compute CPU experts."""

    tp_experts: str
    running: Running
    model: Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = write_checkpoint("deepseek_v3", folder / "model", **MOONLIGHT)
    exact = shutil.copytree(checkpoint, folder / "exact")
    float32 = {name: tensor.float() for name, tensor in load_file(exact / "model.safetensors").items()}
    save_file(float32, exact / "model.safetensors", metadata={"format": "pt"})
    adapters = {
        name: write_per_expert(folder / name, checkpoint, ends, seed=seed, size=0.12)
        for seed, (name, ends) in enumerate(ADAPTERS.items())
    }
    return Model(checkpoint, exact, adapters)


@pytest.fixture(scope="module", params=["split", "rank0"])
def served(request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    words = ["model=auto", f"model.path={model.checkpoint}", "lora=none", RANKS]
    words += [f"lora.adapters.{name}.path={path}" for name, path in model.adapters.items()]
    words += ["proof.whole_model=off", "proof.text=warn", f"kt.tp_experts={request.param}"]
    site = write_plugin(folder / "site", "bringing", BRINGING)
    env = {"PYTHONPATH": str(site)} if request.param == "split" else None
    with launched(*words, runs=folder / "runs", env=env) as running:
        yield Served(request.param, running, model)


def test_each_process_was_proven_on_cpus_of_its_own(served: Served) -> None:
    proof = read_json(served.running.run_folder / "proof.json")
    assert (proof["replicas"], proof["schedulers"]) == (1, 2)
    (own,) = [state["kt_launch"] for state in served.running.client.get("/server_info").json()["internal_states"]]
    (other,) = own["others"]
    assert own["pid"] != other["pid"]
    if served.tp_experts == "split":
        assert not {*own["cpus"]} & {*other["cpus"]}
        assert all(layer["adapter_tokens"] > 0 for rank in (own, other) for layer in rank["layers"])
        return
    assert {*own["cpus"]} > {*other["cpus"]}
    assert {*proof["reference_error"]} == {"base", "adapter"}
    for computed, passed in zip(own["layers"], other["layers"], strict=True):
        assert computed["adapter_tokens"] > 0 and computed["experts"] == 8 and computed["passed"] == 0
        assert passed["passed"] > 0 and passed["experts"] == passed["packed_bytes"] == passed["batches"] == 0


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_two_ranks_answer_as_one_model(served: Served, adapter: str | None) -> None:
    require_one_model(served, adapter, LONG)


@pytest.mark.parametrize("served", ["split"], indirect=True)
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_longer_prompts_bring_each_rank_its_part_of_the_experts(served: Served, adapter: str | None) -> None:
    before = brought(served)
    require_one_model(served, adapter, LONGER)
    for then, now in zip(before, brought(served), strict=True):
        assert now["state"] == "on" and now["tokens_ran"] >= then["tokens_ran"] + LONGER
        assert (now["adapter_tokens_ran"] > then["adapter_tokens_ran"]) == (adapter is not None)


def require_one_model(served: Served, adapter: str | None, length: int) -> None:
    errors = long_errors(served.running, served.model.with_adapter(adapter), adapter, length)
    assert median(errors) < 5
    assert max(errors) < FAR_OFF


def test_an_adapter_is_loaded_and_proven_while_they_run(served: Served) -> None:
    body = {"lora_name": "later", "lora_path": str(served.model.adapters["experts"])}
    answer = served.running.client.post("/load_lora_adapter", json=body)
    assert answer.status_code == 200, answer.text
    proof = answer.json()["adapter"]["proof"]
    assert proof["difference"] > 4 * proof["noise"]
    whole = served.tp_experts == "rank0"  # else each rank has a part of a sum, with which nothing can be compared
    assert (0 < proof["reference_error"] < 0.02) if whole else proof["reference_error"] is None
    served.running.client.post("/unload_lora_adapter", json={"lora_name": "later"}).raise_for_status()


def brought(served: Served) -> list[dict[str, Any]]:
    """What each rank says of it."""
    (own,) = [state["kt_launch"] for state in served.running.client.get("/server_info").json()["internal_states"]]
    return [rank["gpu_prefill"] for rank in (own, *own["others"])]


@pytest.mark.parametrize("served", ["split"], indirect=True)
def test_the_adapters_are_far_from_the_base_on_that_scale(served: Served) -> None:
    for adapter in ADAPTERS:
        assert median(long_errors(served.running, served.model.with_adapter(None), adapter)) > FAR_OFF


def test_they_end_with_their_launcher_however_that_went(served: Served) -> None:
    require_end_without_launcher(served.running)
