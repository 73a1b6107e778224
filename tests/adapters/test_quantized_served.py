"""Quantized experts on a running server: the folder made by the command that the refusal names, or by kt.prepare, then
the packed cache; with an adapter, against transformers in float32 on what the folder stands for. int8 is for the night:
test_west_layout.py has its server held to the same reference, and tests/bench/test_bench.py has its folder prepared. So
is a second start, which maps them: tests/weights/test_mapped.py maps each method's experts, bfloat16's on a server.

The unit is that of test_served.py, and so is the bound, but for one source of errors more: activations are rounded to
eight bits for int8 experts, half a step of 1/127 of their row's maximum.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import KT_LAUNCH, Running, finish, launched, wait_until
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from written import write_converted

from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.families import FAMILIES, expert_weights
from kt_model.importer import import_adapter
from kt_model.methods import METHODS
from kt_model.weights.folder import LayerReader, dequantized
from kt_model.weights.merging import merge

pytestmark = pytest.mark.server
EPS, LAYERS = 2.0**-8, 3
PROMPTS = ("hello world", "The quick brown fox jumps over", "Why does bread rise", "a boy was whistling", "Tell me")
ADAPTER = Path(__file__).parent.parent / "fixtures" / "adapters" / "deepseek_v2" / "experts_r4"
Logprobs = dict[str | None, list[torch.Tensor]]


@dataclass
class Folder:
    """A checkpoint, the words that serve it with this method, and where its runs and caches lie."""

    checkpoint: Path
    method: str
    runs: Path

    @property
    def words(self) -> list[str]:
        base = ["model=auto", f"model.path={self.checkpoint}", f"kt.method={self.method}"]
        base += ["proof.whole_model=off", "proof.text=warn"]
        return [*base, f"lora=[{{name: r4, path: '{ADAPTER}'}}]"]

    @property
    def quantized(self) -> Path:
        (folder,) = (self.runs / "cache" / "weights").glob(f"model-{METHODS[self.method].sglang_name}-*")
        return folder


@pytest.fixture(scope="module", params=[pytest.param("int8", marks=pytest.mark.nightly), "int4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    root = tmp_path_factory.mktemp(request.param)
    yield Folder(write_checkpoint("deepseek_v2", root / "model"), request.param, root / "runs")


def state_of(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = running.client.get("/server_info").json()["internal_states"][0]["kt_launch"]
    return found


def answers(running: Running) -> dict[str | None, list[dict[int, float]]]:
    return {name: [running.logprobs(prompt, name)[0] for prompt in PROMPTS] for name in (None, "r4")}


def make_as_told(folder: Folder) -> None:
    """Serving is refused with a command; that command, run as it is printed, makes the folder."""
    code, _, errors = finish(*folder.words, runs=folder.runs)
    assert code == 2, errors
    message = errors.partition(" Run ")[2].partition(", or add kt.prepare=true.")[0]
    assert message == f"kt-launch quantize model=auto model.path={folder.checkpoint} kt.method={folder.method}"
    name, *words = shlex.split(message)
    assert name == KT_LAUNCH.name
    code, out, errors = finish(*words, runs=folder.runs)
    assert code == 0, errors
    assert out.startswith(f"made: {folder.quantized} (")


@pytest.fixture(scope="module")
def first_answers(folder: Folder) -> dict[str | None, list[dict[int, float]]]:
    """Of the first start, which packs the folder's experts. int8's folder is made by it, int4's by the command."""
    extra = ["kt.prepare=true"] if folder.method == "int8" else []
    if not extra:
        make_as_told(folder)
    allowed = folder.runs.parent
    with launched(*folder.words, *extra, f"lora.allow=['{allowed}']", runs=folder.runs) as running:
        assert {layer["method"] for layer in running.layers()} == {METHODS[folder.method].sglang_name}
        assert not any(layer["mapped"] for layer in running.layers())
        assert state_of(running)["unread_tensors"] == 3 * sum(layer["experts"] for layer in running.layers())
        found = answers(running)
        wait_until(lambda: state_of(running)["packed_cache"]["state"] == "written")
        require_room_for_format_c(running, folder, allowed)
    return found


def write_dequantized(folder: Folder, target: Path) -> Path:
    """The checkpoint in float32, its experts being what the quantized ones stand for."""
    shutil.copytree(folder.checkpoint, target)
    base = read_checkpoint(folder.checkpoint)
    weights = {name: tensor.float() for name, tensor in load_file(target / "model.safetensors").items()}
    method = METHODS[folder.method]
    for layer in base.moe_layers:
        reader = LayerReader(folder.quantized, layer)
        for expert in range(base.num_experts):
            arrays = reader.expert(expert)
            names = expert_weights(FAMILIES["deepseek_v2"], layer, expert)
            for part, name in zip(("gate", "up", "down"), names, strict=True):
                values = dequantized(method, arrays[part], arrays[f"{part}_scale"], weights[name].shape[1])
                weights[name] = torch.from_numpy(values.copy())
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def reference(folder: Folder, first_answers: Any, tmp_path_factory: pytest.TempPathFactory) -> Logprobs:
    """By adapter, and None for the base: logprobs of each prompt's next token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exact = write_dequantized(folder, tmp_path_factory.mktemp("exact") / "model")
    base, merged = read_checkpoint(exact), tmp_path_factory.mktemp("merged") / "r4"
    merge(ExpertSource(base), import_adapter(ADAPTER, base).require_sound(), merged)
    tokenizer, found = AutoTokenizer.from_pretrained(exact), {}
    for name, path in ((None, exact), ("r4", merged)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
            found[name] = [torch.log_softmax(model(one).logits[0, -1].float(), dim=-1) for one in ids]
    return found


def test_served_logprobs_are_those_of_the_values_in_the_folder(first_answers: Any, reference: Logprobs) -> None:
    for name, expected in reference.items():
        deviations = []
        for found, expected_V in zip(first_answers[name], expected, strict=True):
            error = max(abs(p - float(expected_V[token])) for token, p in found.items())
            deviations.append(error / (2 * EPS / 2 * (2 * LAYERS + 1) ** 0.5 * float(expected_V.std())))
        shown = f"{name}: max |Δ| in standard deviations {[round(one, 1) for one in deviations]}"
        print(shown)
        assert sorted(deviations)[len(deviations) // 2] < 6, shown
        assert max(deviations) < 16, shown
    for with_adapter, bare in zip(reference["r4"], reference[None], strict=True):
        assert float((with_adapter - bare).abs().max()) > bare.std() / 2


@pytest.mark.nightly
def test_a_second_start_maps_them_and_answers_the_same(folder: Folder, first_answers: Any) -> None:
    with launched(*folder.words, runs=folder.runs) as running:
        assert all(layer["mapped"] for layer in running.layers())
        assert state_of(running)["packed_cache"]["state"] == "mapped"
        assert answers(running) == first_answers


def require_room_for_format_c(running: Running, folder: Folder, allowed: Path) -> None:
    """r says 3, but gate_up has twice that; the server has room for 4, and its answer says how to start it."""
    path = write_converted(allowed / "converted", folder.checkpoint, seed=7, rank=3)
    answer = running.client.post("/load_lora_adapter", json={"lora_name": "c", "lora_path": str(path)})
    assert answer.status_code == 400
    message = "has rank 6, but this server accepts ranks up to 4. Start it with lora.max_rank=6 or larger."
    assert f"lora_path: {path} {message}" in answer.text
    assert len(running.logprobs(PROMPTS[0])[0]) == 20
