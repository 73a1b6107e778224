"""Several adapters on one server whose pool is smaller than they are many: `lora=[preset,{name, path}]`, SGLang's own
eviction, and expert adapters loaded and unloaded while requests run, many times over.

An adapter's own answer, from before anything came or went, is what its later answers are held against: the kernels'
sums do not depend on the batch but for the order of bfloat16 roundings, of which LOGPROB_NOISE is far above.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from launching import TOP, Running, launched
from tiny_checkpoints import write_checkpoint
from written import write_fused, write_kt_training, write_per_expert

pytestmark = pytest.mark.server
PROMPT = "The quick brown fox jumps over"
EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
LOGPROB_NOISE = 0.1
ROUNDS = 60
STARTED = ("chef", "west", "kt")


@dataclass
class Served:
    """A server with a pool of two slots, three adapters from its start on, and two more to load."""

    running: Running
    adapters: dict[str, Path]
    before: dict[str | None, dict[int, float]]
    """First answers, one adapter after another."""

    def check(self, name: str | None) -> None:
        """The answer is the one from before."""
        distance = self.distance(self.running.logprobs(PROMPT, name)[0], name)
        assert distance < LOGPROB_NOISE, f"{name}: {distance:.3f} off its first answer"

    def distance(self, found: dict[int, float], name: str | None) -> float:
        """Largest difference over the tokens that both name; infinite where the likeliest tokens are others."""
        shared = found.keys() & self.before[name].keys()
        if len(shared) < TOP * 0.7:
            return float("inf")
        return max(abs(found[token] - self.before[name][token]) for token in shared)

    def load(self, name: str) -> None:
        body = {"lora_name": name, "lora_path": str(self.adapters[name])}
        answer = self.running.client.post("/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text

    def unload(self, name: str) -> None:
        self.running.client.post("/unload_lora_adapter", json={"lora_name": name}).raise_for_status()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("several")
    checkpoint = write_checkpoint("deepseek_v2", folder / "model")
    adapters = {
        "chef": write_fused(folder / "a chef's", checkpoint, seed=1),
        "west": write_per_expert(folder / "west", checkpoint, EXPERTS, seed=2),
        "kt": write_kt_training(folder / "kt", checkpoint, seed=3),
        "later": write_fused(folder / "later", checkpoint, seed=4),
        "last": write_per_expert(folder / "last", checkpoint, [*EXPERTS, ".o_proj"], seed=5),
    }
    (folder / "conf" / "lora").mkdir(parents=True)
    preset = f"# @package lora.adapters.west\npath: {adapters['west']}\n"
    (folder / "conf" / "lora" / "west.yaml").write_text(preset)
    words = (
        f"--config-dir={folder / 'conf'}", "model=auto", f"model.path={checkpoint}", "lora.max_per_batch=2",
        f'lora=[west,{{name: chef, path: "{adapters["chef"]}"}},{{name: kt, path: {adapters["kt"]}}}]',
    )  # fmt: skip
    with launched(*words, runs=folder / "runs") as running:
        before = {name: running.logprobs(PROMPT, name)[0] for name in (None, *STARTED)}
        yield Served(running, adapters, before)


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
            served.check(name)
    assert all(layer["adapter_slots"] <= 2 for layer in served.running.layers())


def test_requests_for_all_of_them_at_once_wait_their_turn(served: Served) -> None:
    order = ["kt", None, "west", "chef", "west", None, "kt", "chef"]
    answers = served.running.logprobs([PROMPT] * len(order), order)
    for name, found in zip(order, answers, strict=True):
        assert served.distance(found, name) < LOGPROB_NOISE, name


def resident_bytes(running: Running) -> int:
    """Of the scheduler, the largest of the server's processes."""
    return max(process.memory_info().rss for process in running.server_processes())


def test_loading_and_unloading_with_requests_in_flight_leaves_nothing_behind(served: Served) -> None:
    stop, wrong = threading.Event(), []

    def keep_asking(name: str | None) -> None:
        with httpx.Client(base_url=served.running.client.base_url, timeout=120, trust_env=False) as client:
            while not stop.is_set():
                body = {"text": PROMPT, "lora_path": name, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
                answer = client.post("/generate", json=body)
                if answer.status_code != 200:
                    wrong.append(f"{name}: {answer.text}")

    asking = [threading.Thread(target=keep_asking, args=[name]) for name in ("kt", None)]
    for thread in asking:
        thread.start()
    try:
        resident = []
        for _ in range(ROUNDS):
            for name in ("later", "last"):
                served.load(name)
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
    assert "later" not in served.running.client.get("/v1/models").text
    for name in (None, *STARTED):
        served.check(name)
