"""Adapters of every format on a running server whose pool is smaller than they are many, against transformers on the
checkpoint that action=merge makes of them: `lora=[preset,{name, path}]`, SGLang's own eviction, and adapters loaded and
unloaded while requests run, many times over.

One DeepSeek-V2 server: MLA without a low-rank q is the family in which the most parts of an adapter could get lost.
Some experts of each layer are resident on the model's device, the others in kt_kernels, so that adapters act, come and
go in both halves; which are resident is what a server recorded before. test_fidelity.py and test_loading.py have all
of them in kt_kernels.

An adapter's own answer, from before anything came or went, is what its later answers are held against: the kernels'
sums do not depend on the batch but for the order of bfloat16 roundings, of which LOGPROB_NOISE is far above.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from endings import require_end_without_detokenizer
from launching import LONG_S, Running, launched, wait_until
from served_adapters import LOGPROB_NOISE, PROMPT, STARTED, Logprobs, Served, write_adapters
from tiny_checkpoints import write_checkpoint

from kt_launch.proving.graphs import LIMIT, replay_differences
from kt_launch.watching.liveness import outputs_of
from kt_model.checkpoint import read_checkpoint
from kt_model.expert_profile import write_profile
from kt_model.importer import import_adapter
from kt_model.importer.normal import KINDS

pytestmark = pytest.mark.server
ROUNDS = 60
RESIDENT = 3
COUNTS = {1: [1, 0, 9, 4, 0, 0, 8, 2], 2: [0, 7, 0, 7, 7, 0, 1, 1]}
"""By layer, how often each expert was chosen."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = write_checkpoint("deepseek_v2", folder / "model")
    adapters = write_adapters(folder, checkpoint)
    adapters["attention"] = adapters["attention"].rename(folder / "the chef's attention")
    write_profile(folder / "profile.json", COUNTS)
    (folder / "conf" / "lora").mkdir(parents=True)
    preset = f"# @package lora.adapters.patterns\npath: {adapters['patterns']}\n"
    (folder / "conf" / "lora" / "patterns.yaml").write_text(preset)
    words = (
        f"--config-dir={folder / 'conf'}", "model=auto", f"model.path={checkpoint}", "lora.max_per_batch=2",
        f'lora=[patterns,{{name: attention, path: "{adapters["attention"]}"}},{{name: kt, path: {adapters["kt"]}}}]',
        f"kt.num_gpu_experts={RESIDENT}", f"kt.expert_profile={folder / 'profile.json'}",
        "proof.whole_model=off", "proof.text=warn",
    )  # fmt: skip
    with launched(*words, runs=folder / "runs") as running:
        yield Served(running, checkpoint, adapters)


def test_nobody_stops_or_reads_what_others_ask_without_an_admin_key(served: Served) -> None:
    """Of a server without keys, which everyone on this machine may ask."""
    kept = (
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/start_profile",
        "/slow_down",
        "/open_session",
    )
    for path in kept:
        refused = served.post(path, rid="", abort_all=True, mode="abort")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_admin_key"), path
        assert "server.admin_key=env:KT_LAUNCH_ADMIN_KEY" in refused.json()["error"]["message"]
    assert served.running.client.get("/configure_logging").status_code == 403
    assert served.post("/flush_cache").status_code == 200
    assert served.post("/generate", text="a", sampling_params={"max_new_tokens": 2}).status_code == 200


def test_a_start_without_keys_asks_nothing_that_is_kept_from_it(served: Served) -> None:
    log = (served.running.run_folder / "server.log").read_text()
    assert "ready to roll" in log and "Traceback" not in log and "POST /freeze_gc" not in log


def test_what_schedulers_send_to_the_detokenizer_comes_back(served: Served) -> None:
    """By the counts that tell whether it hangs; streams and aborted requests, too."""
    client = served.running.client
    many = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 24, "ignore_eos": True}, "stream": True}
    with client.stream("POST", "/generate", json=many) as answer:
        next(answer.iter_bytes())
    assert served.post("/generate", text="a", sampling_params={"max_new_tokens": 2}).status_code == 200
    wait_until(lambda: len({*outputs_of(client.get("/server_info"))}) == 1)
    assert outputs_of(client.get("/server_info"))[0] > 10


def test_served_adapters_are_the_merged_checkpoints(served: Served, merged_logprobs: Logprobs) -> None:
    for name in (None, *STARTED):
        served.check(name, merged_logprobs)
    for name in served.adapters:
        for with_adapter, base in zip(merged_logprobs[name], merged_logprobs[None], strict=True):
            assert float((with_adapter - base).abs().max()) > base.std() / 2
    for layer in served.running.layers():
        assert layer["experts"] == 8 - RESIDENT
        assert layer["adapter_tokens"] > 0


def test_adapters_are_loaded_into_a_running_server(served: Served, merged_logprobs: Logprobs) -> None:
    for name in ("fused", "fused_old", "converted", "up"):
        answer = served.load(name)
        assert answer.status_code == 200, answer.text
        served.check(name, merged_logprobs)
        served.check(None, merged_logprobs)
        served.unload(name)
        assert name not in served.running.client.get("/v1/models").text
    served.check("kt", merged_logprobs)


def test_an_unsound_adapter_is_refused_by_name_and_the_server_goes_on(served: Served) -> None:
    """Whatever of an adapter is wrong is said in the answer, as it would be before a start."""
    folder = served.adapters["kt"].with_name("broken")
    folder.mkdir()
    for file in served.adapters["kt"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    answer = served.post("/load_lora_adapter", lora_name="broken", lora_path=str(folder))
    assert answer.status_code == 400
    assert "lora_path: adapter_config.json asks for something that is not supported: use_dora (DoRA)." in answer.text
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
    with httpx.Client(base_url=served.running.client.base_url, timeout=LONG_S, trust_env=False) as client:
        while not stop.is_set():
            body = {"text": PROMPT, "lora_path": name, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
            answer = client.post("/generate", json=body)
            if answer.status_code != 200:
                wrong.append(f"{name}: {answer.text}")


def test_loading_and_unloading_with_requests_in_flight_leaves_nothing_behind(
    served: Served, merged_logprobs: Logprobs
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
    # From here on the allocator has what it takes. What each round keeps shows in all of them; one step does not.
    grown = [after - before for before, after in pairwise([max(resident[20:40]), *resident[40:]])]
    assert sum(grown) - max(grown) < 8 << 20, [one >> 20 for one in resident]
    assert "fused" not in served.running.client.get("/v1/models").text
    for side in (None, *STARTED):
        served.check_unchanged(side)
        served.check(side, merged_logprobs)


def test_every_part_of_an_adapter_was_tried(served: Served) -> None:
    """The adapters above reach every kind of module that is served, so that a silent skip cannot hide."""
    base = read_checkpoint(served.checkpoint)
    kinds = {pair.target.kind for name in served.adapters for pair in _pairs(served.adapters[name], base)}
    assert kinds == {*KINDS} - {"router", "embeddings"}
    assert psutil.pid_exists(served.running.process.pid)


def test_a_server_without_its_detokenizer_is_ended(served: Served) -> None:
    require_end_without_detokenizer(served.running)


def _pairs(adapter: Path, base: Any) -> Any:
    return import_adapter(adapter, base).pairs.values()
