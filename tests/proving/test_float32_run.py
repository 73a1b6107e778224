"""The process that runs the whole model: what it writes, what it says when it cannot, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import pytest
import torch
from launching import wait_until
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM
from written import write_fused, write_kt_training, write_per_expert

from kt_launch.machine.processes import command_of
from kt_launch.proving.float32_run import why_not_peft
from kt_launch.proving.logprobs import TOP, random_prompts
from kt_launch.proving.whole_model import Float32Run
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import ProofFailed
from kt_model.importer import import_adapter
from kt_model.plan import LaunchPlan, Resolved

EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]


def make_plan(
    checkpoint: Path, adapters: dict[str, Path] | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> LaunchPlan:
    values = {
        "model.path": str(checkpoint),
        "model.vocab_size": 512,
        "kt.method": "bf16",
        "kt.weight_path": str(checkpoint),
        "kt.num_gpu_experts": 0,
        "server.context_length": 64,
        "server.max_total_tokens": None,
        "proof.whole_model": "auto",
        **{f"lora.{name}.path": str(path) for name, path in (adapters or {}).items()},
        **changes,
    }
    resolved = {key: Resolved(value, "derived: 9 GiB on disk, more than 2") for key, value in values.items()}
    return LaunchPlan({"server": {"extra_args": []}}, resolved, (sys.executable,), {}, ())


def server(probability: float) -> httpx.Client:
    """Finds token 0 that probable everywhere, and the next nineteen far less."""

    def answer(request: httpx.Request) -> httpx.Response:
        row = [[-probability - token, token, None] for token in range(TOP)]
        prompts = json.loads(request.content or b"{}").get("input_ids", [])
        found = [
            {"input_token_logprobs": [[None, 0, None]] + [[-1.0, 0, None]] * (len(prompt) - 1),
             "input_top_logprobs": [None] + [row] * (len(prompt) - 1), "output_top_logprobs": [row]}
            for prompt in prompts
        ]  # fmt: skip
        return httpx.Response(200, json=[{"meta_info": one} for one in found])

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))


def server_of(models: dict[str | None, Any], mixed_up: bool) -> httpx.Client:
    """Runs these models, by adapter; mixed_up: in a batch of several it takes every request for the base's."""

    def row(logprobs_V: torch.Tensor) -> list[list[Any]]:
        values, ids = logprobs_V.topk(TOP)
        return [[value, token, None] for value, token in zip(values.tolist(), ids.tolist(), strict=True)]

    def answer(request: httpx.Request) -> httpx.Response:
        body, found = json.loads(request.content or b"{}"), []
        prompts, names = body.get("input_ids", []), body.get("lora_path")
        for place, prompt in enumerate(prompts):
            name = names[place] if isinstance(names, list) else names
            model = models[None if mixed_up and isinstance(names, list) else name]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float()
            rows = [row(one) for one in torch.log_softmax(logits, dim=-1)]
            given = [[None, 0, None]] + [[-1.0, 0, None]] * (len(prompt) - 1)
            message = {"input_token_logprobs": given, "input_top_logprobs": [None, *rows[:-1]]}
            found.append({"meta_info": {**message, "output_top_logprobs": [rows[-1]]}})
        return httpx.Response(200, json=found)

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "model")


def test_a_server_that_computes_something_else_fails_and_the_worst_is_told(checkpoint: Path, tmp_path: Path) -> None:
    with Float32Run(make_plan(checkpoint), tmp_path) as run, pytest.raises(ProofFailed) as failure:
        run.check(server(0.5))
    message = str(failure.value)
    assert message.startswith(f"proof: the server does not compute the model of {checkpoint}: ")
    assert re.search(
        r"Worst: prompt \d of 8, position \d+, token \d+: logprob -[\d.]+, expected -[\d.]+\. Its ans", message
    )
    assert "proof.whole_model=off serves it" in message
    assert failure.value.exit_code == 4
    kept = sorted(file.name for file in (tmp_path / "float32").iterdir())
    assert kept == ["reference-0.npz", "request.json", "served-0.npz"]


def test_a_server_that_mixes_up_a_batch_fails_and_a_right_one_does_not(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_per_expert(tmp_path / "west", checkpoint, EXPERTS)
    load = partial(AutoModelForCausalLM.from_pretrained, checkpoint, dtype=torch.bfloat16)
    models = {None: load().eval(), "west": PeftModel.from_pretrained(load(), adapter).eval()}
    with Float32Run(make_plan(checkpoint, {"west": adapter}), tmp_path) as run:
        findings = run.check(server_of(models, mixed_up=False))
        assert set(findings.together) == set(findings.sides) == {"base", "west"}
        assert any(
            "base, west in one batch give the same, with a difference of 0.0" in line for line in findings.lines()
        )
        with pytest.raises(ProofFailed, match=r"lora\.west: asked in one batch .* asked alone they are right"):
            run.check(server_of(models, mixed_up=True))


def test_what_transformers_cannot_run_is_not_checked_and_why_is_said(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.self_attn.q_norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with Float32Run(make_plan(broken, {"west": tmp_path / "none"}), tmp_path) as run:
        findings = run.check(server(0.5))
    assert findings.sides == {}
    (line,) = findings.lines()
    assert "base, west not compared with transformers: transformers could not run it (NotThere: " in line
    assert "model.layers.1.self_attn.q_norm.weight" in line and str(tmp_path / "float32.log") in line
    assert "Traceback" in (tmp_path / "float32.log").read_text()


def test_a_plan_that_says_no_starts_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with Float32Run(make_plan(checkpoint, changes={"proof.whole_model": "off"}), tmp_path) as run:
        findings = run.check(server(0.5))
    assert findings.unchecked == {"base": "9 GiB on disk, more than 2"}
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_the_process(checkpoint: Path, tmp_path: Path) -> None:
    def children() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if str(tmp_path) in command_of(child)]

    with pytest.raises(KeyboardInterrupt), Float32Run(make_plan(checkpoint), tmp_path):
        wait_until(children)
        raise KeyboardInterrupt
    assert children() == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["float32.log"]


def test_prompts_are_random_long_and_fit_the_context(checkpoint: Path) -> None:
    prompts = random_prompts(make_plan(checkpoint, changes={"server.context_length": 4096}))
    assert [len(prompt) for prompt in prompts] == [24, 40, 56, 72, 88, 104, 136, 200]
    assert all(len(set(prompt)) > 0.8 * len(prompt) for prompt in prompts)
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 8
    assert max(len(prompt) for prompt in random_prompts(make_plan(checkpoint))) == 56


def written(folder: Path, checkpoint: Path) -> dict[str, Path]:
    return {
        "plain": write_per_expert(folder / "plain", checkpoint, EXPERTS),
        "attention": write_per_expert(folder / "attention", checkpoint, [".o_proj"], use_rslora=True),
        "rslora": write_per_expert(folder / "rslora", checkpoint, EXPERTS, use_rslora=True),
        "fused": write_fused(folder / "fused", checkpoint),
        "old": write_fused(folder / "old", checkpoint, old=True),
        "kt": write_kt_training(folder / "kt", checkpoint),
    }


def test_peft_is_asked_where_it_reads_what_was_trained(checkpoint: Path, tmp_path: Path) -> None:
    base = read_checkpoint(checkpoint)
    why: Callable[[Path], str] = lambda path: why_not_peft(import_adapter(path, base), whole=True)  # noqa: E731
    found = {name: why(path) for name, path in written(tmp_path, checkpoint).items()}
    assert [name for name, reason in found.items() if not reason] == ["plain", "attention", "fused"]
    assert found["rslora"] == "PEFT packs per-expert rsLoRA and patterns with other scales"
    assert found["old"] == "an older PEFT's layout of fused experts (0.18.1)"
    assert found["kt"] == "not PEFT's format"
    assert why_not_peft(import_adapter(tmp_path / "plain", base), whole=False) == "parts of it are left out"
