"""Adapters of every format on a running server whose pool is smaller than they are many, against transformers on the
checkpoint that action=merge makes of them: `lora=[preset,{name, path}]`, SGLang's own eviction, and adapters loaded and
unloaded while requests run, many times over.

One DeepSeek-V2 server: MLA without a low-rank q is the family in which the most parts of an adapter could get lost. The
unit is that of tests/support/float32_model.py: a standard deviation is 2·eps/2·sqrt(2L+1)·std(logits). The median
prompt's largest error must be below 6 of them, as there. One prompt may reach 16: where two experts nearly tie in the
router, bfloat16 picks the other one. The adapters move logprobs by 50 and more, so a part that is left out shows.

An adapter's own answer, from before anything came or went, is what its later answers are held against: the kernels'
sums do not depend on the batch but for the order of bfloat16 roundings, of which LOGPROB_NOISE is far above.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from launching import TOP, Running, launched
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from written import write_converted, write_fused, write_kt_training, write_per_expert

from kt_launch.proving.graphs import LIMIT, replay_differences
from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.importer import import_adapter
from kt_model.importer.normal import KINDS
from kt_model.weights.merging import merge

pytestmark = pytest.mark.server
EPS, LAYERS = 2.0**-8, 3
PROMPT = "The quick brown fox jumps over"
PROMPTS = ("hello world", PROMPT, "Why does bread rise", "a boy was whistling", "Tell me which numbers")
ATTENTION = [".q_proj", ".kv_a_proj_with_mqa", ".kv_b_proj", ".o_proj"]
EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
LOGPROB_NOISE = 0.1
ROUNDS = 60
STARTED = ("attention", "patterns", "kt")
DENSE = [f".{place}.{part}_proj" for place in ("mlp", "shared_experts") for part in ("gate", "up", "down")]


def write_adapters(folder: Path, checkpoint: Path) -> dict[str, Path]:
    return {
        "attention": write_per_expert(folder / "the chef's attention", checkpoint, ATTENTION, seed=1),
        "patterns": write_per_expert(
            folder / "patterns",
            checkpoint,
            [*EXPERTS, *DENSE, ".o_proj"],
            seed=2,
            ranks={"down_proj": 6, "o_proj": 2},
            alpha_pattern={"up_proj": 3},
            lora_alpha=3,
            use_rslora=True,
        ),
        "up": write_per_expert(folder / "up", checkpoint, [end for end in EXPERTS if "up_proj" in end], seed=3),
        "fused": write_fused(folder / "fused", checkpoint, seed=4),
        "converted": write_converted(folder / "converted", checkpoint, seed=7, rank=2),
        "fused_old": write_fused(folder / "fused_old", checkpoint, seed=5, old=True),
        "kt": write_kt_training(folder / "kt", checkpoint, seed=6),
    }


class Served:
    """A running server with a pool of two slots, its checkpoint, and the adapters: those of STARTED are there from its
    start on, the others are loaded by a test. before: first answers, one adapter after another."""

    def __init__(self, running: Running, checkpoint: Path, adapters: dict[str, Path]) -> None:
        self.running, self.checkpoint, self.adapters = running, checkpoint, adapters
        self.before = {name: running.logprobs(PROMPT, name)[0] for name in (None, *STARTED)}

    def post(self, what: str, **body: Any) -> httpx.Response:
        return self.running.client.post(what, json=body)

    def load(self, name: str) -> httpx.Response:
        return self.post("/load_lora_adapter", lora_name=name, lora_path=str(self.adapters[name]))

    def unload(self, name: str) -> None:
        self.post("/unload_lora_adapter", lora_name=name).raise_for_status()

    def check(self, name: str | None, expected: dict[str | None, list[torch.Tensor]]) -> None:
        """Served logprobs against those of the merged checkpoint, over all prompts."""
        deviations = []
        for prompt, expected_V in zip(PROMPTS, expected[name], strict=True):
            found = self.running.logprobs(prompt, name)[0]
            error = max(abs(p - float(expected_V[token])) for token, p in found.items())
            deviations.append(error / (2 * EPS / 2 * (2 * LAYERS + 1) ** 0.5 * float(expected_V.std())))
        shown = f"{name}: max |Δ| in standard deviations {[round(one, 1) for one in deviations]}"
        print(shown)
        assert sorted(deviations)[len(deviations) // 2] < 6, shown
        assert max(deviations) < 16, shown

    def check_unchanged(self, name: str | None) -> None:
        """The answer is the one from before."""
        distance = self.distance(self.running.logprobs(PROMPT, name)[0], name)
        assert distance < LOGPROB_NOISE, f"{name}: {distance:.3f} off its first answer"

    def distance(self, found: dict[int, float], name: str | None) -> float:
        """Largest difference over the tokens that both name; infinite where the likeliest tokens are others."""
        shared = found.keys() & self.before[name].keys()
        if len(shared) < TOP * 0.7:
            return float("inf")
        return max(abs(found[token] - self.before[name][token]) for token in shared)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = write_checkpoint("deepseek_v2", folder / "model")
    adapters = write_adapters(folder, checkpoint)
    (folder / "conf" / "lora").mkdir(parents=True)
    preset = f"# @package lora.adapters.patterns\npath: {adapters['patterns']}\n"
    (folder / "conf" / "lora" / "patterns.yaml").write_text(preset)
    words = (
        f"--config-dir={folder / 'conf'}", "model=auto", f"model.path={checkpoint}", "lora.max_per_batch=2",
        f'lora=[patterns,{{name: attention, path: "{adapters["attention"]}"}},{{name: kt, path: {adapters["kt"]}}}]',
        "proof.whole_model=off", "proof.text=warn",
    )  # fmt: skip
    with launched(*words, runs=folder / "runs") as running:
        yield Served(running, checkpoint, adapters)


@pytest.fixture(scope="module")
def merged_logprobs(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, list[torch.Tensor]]:
    """By adapter, and None for the base: logprobs of each prompt's next token, of checkpoints merged in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exact = shutil.copytree(served.checkpoint, tmp_path_factory.mktemp("exact") / "model")
    weights = load_file(exact / "model.safetensors")
    float32 = {name: tensor.float() for name, tensor in weights.items()}
    save_file(float32, exact / "model.safetensors", metadata={"format": "pt"})
    base = read_checkpoint(exact)
    folders: dict[str | None, Path] = {None: served.checkpoint}
    for name, adapter in served.adapters.items():
        folders[name] = tmp_path_factory.mktemp("merged") / name
        merge(ExpertSource(base), import_adapter(adapter, base).demand_sound(), folders[name])  # type: ignore[arg-type]
    tokenizer, logprobs = AutoTokenizer.from_pretrained(served.checkpoint), {}
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logprobs[name] = [torch.log_softmax(model(one).logits[0, -1].float(), dim=-1) for one in ids]
    return logprobs


def test_served_adapters_are_the_merged_checkpoints(
    served: Served, merged_logprobs: dict[str | None, list[torch.Tensor]]
) -> None:
    for name in (None, *STARTED):
        served.check(name, merged_logprobs)
    for name in served.adapters:
        for with_adapter, base in zip(merged_logprobs[name], merged_logprobs[None], strict=True):
            assert float((with_adapter - base).abs().max()) > base.std() / 2


def test_adapters_are_loaded_into_a_running_server(
    served: Served, merged_logprobs: dict[str | None, list[torch.Tensor]]
) -> None:
    for name in ("fused", "fused_old", "converted", "up"):
        answer = served.load(name)
        assert answer.status_code == 200, answer.text
        served.check(name, merged_logprobs)
        served.check(None, merged_logprobs)
        served.unload(name)
        assert name not in served.running.client.get("/v1/models").text
    served.check("kt", merged_logprobs)


def test_an_unsound_adapter_is_refused_by_name_and_the_server_goes_on(served: Served, tmp_path: Path) -> None:
    """Whatever of an adapter is wrong is said in the answer, as it would be before a start."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in served.adapters["kt"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    answer = served.post("/load_lora_adapter", lora_name="broken", lora_path=str(folder))
    assert answer.status_code == 400
    assert "lora_path: adapter_config.json asks for what is not supported: use_dora (DoRA)." in answer.text
    assert len(served.running.logprobs(PROMPT)[0]) == 20


class ReadsAsBase:
    """A client whose prompts of token ids, which are the second half of the comparison, forget their adapters."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def post(self, url: str, json: dict[str, Any] | None = None) -> httpx.Response:
        if json and "input_ids" in json:
            json = {key: value for key, value in json.items() if key != "lora_path"}
        return self.client.post(url, json=json)


def test_tokens_have_the_same_logprobs_when_written_and_when_read(served: Served) -> None:
    """What the proof asks where decode steps are replayed; an adapter that one of the two forgets shows."""
    client, names = served.running.client, STARTED
    found = replay_differences(client, names)
    assert found.keys() == {"base", *names} and max(found.values()) < LIMIT, found
    forgotten = replay_differences(ReadsAsBase(client), names)  # type: ignore[arg-type]
    assert forgotten["base"] < LIMIT and min(forgotten[name] for name in names) > LIMIT, forgotten


def test_each_adapter_answers_as_itself(served: Served) -> None:
    models = served.running.client.get("/v1/models").text
    for name in STARTED:
        assert name in models
        others = [other for other in (None, *STARTED) if other != name]
        assert min(served.distance(served.before[name], other) for other in others) > 5 * LOGPROB_NOISE


def test_more_adapters_than_slots_take_turns(served: Served) -> None:
    """Two slots, one of them for the bare model when it is asked: every change of adapter evicts another."""
    for _ in range(4):
        for name in (*STARTED, None):
            served.check_unchanged(name)
    assert all(layer["adapter_slots"] <= 2 for layer in served.running.layers())


def test_requests_for_all_of_them_at_once_wait_their_turn(served: Served) -> None:
    order = ["kt", None, "patterns", "attention", "patterns", None, "kt", "attention"]
    answers = served.running.logprobs([PROMPT] * len(order), order)
    for name, found in zip(order, answers, strict=True):
        assert served.distance(found, name) < LOGPROB_NOISE, name


def resident_bytes(running: Running) -> int:
    """Of the scheduler."""
    (scheduler,) = (process for process in running.server_processes() if "::sched" in process.name())
    return int(scheduler.memory_info().rss)


def keep_asking(served: Served, name: str | None, stop: threading.Event, wrong: list[str]) -> None:
    """Until `stop`; answers that are none are noted."""
    with httpx.Client(base_url=served.running.client.base_url, timeout=120, trust_env=False) as client:
        while not stop.is_set():
            body = {"text": PROMPT, "lora_path": name, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
            answer = client.post("/generate", json=body)
            if answer.status_code != 200:
                wrong.append(f"{name}: {answer.text}")


def test_loading_and_unloading_with_requests_in_flight_leaves_nothing_behind(
    served: Served, merged_logprobs: dict[str | None, list[torch.Tensor]]
) -> None:
    """Two threads keep asking while two adapters come and go; nothing is dropped, mixed up or kept."""
    stop, wrong, resident = threading.Event(), list[str](), list[int]()
    asking = [threading.Thread(target=keep_asking, args=[served, name, stop, wrong]) for name in ("kt", None)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(ROUNDS):
            for name in ("fused", "up"):
                assert served.load(name).status_code == 200
                found = served.running.logprobs(PROMPT, name)[0]
                served.before.setdefault(name, found)
                assert served.distance(found, name) < LOGPROB_NOISE
                served.unload(name)
            resident.append(resident_bytes(served.running))
    finally:
        stop.set()
        for thread in asking:
            thread.join()
    assert wrong == []
    warm, late = resident[20:40], resident[-10:]  # by then the allocator has what it takes; it stays so for hundreds
    assert max(late) - max(warm) < 8 << 20, [one >> 20 for one in resident]
    assert "fused" not in served.running.client.get("/v1/models").text
    for name in (None, *STARTED):
        served.check_unchanged(name)
        served.check(name, merged_logprobs)


def test_every_part_of_an_adapter_was_tried(served: Served) -> None:
    """The adapters above reach every kind of module that is served, so that a silent skip cannot hide."""
    base = read_checkpoint(served.checkpoint)
    kinds = {pair.target.kind for name in served.adapters for pair in _pairs(served.adapters[name], base)}
    assert kinds == {*KINDS} - {"router", "embeddings"}
    assert psutil.pid_exists(served.running.process.pid)


def _pairs(adapter: Path, base: Any) -> Any:
    return import_adapter(adapter, base).pairs.values()
