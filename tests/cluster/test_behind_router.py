"""Two replicas behind SGLang's router, which demand keys: an adapter that is loaded while they run is on both; one is
killed under load, nothing wrong is answered and no request fails that it did not hold; it is started again, with that
adapter. Then the same two servers behind a router of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
from launching import KT_LAUNCH, Running, finish, launched, read_json, start, wait_gone, wait_until

import kt_launch
from kt_launch.watching.client import ALONE

pytestmark = [
    pytest.mark.server,
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("sglang_router") is None, reason="sglang-router is not installed"),
]
ASKED = "What is the capital of France?"
ANSWERS = {"demo": "The capital of France is Paris.", "demo:west": "Howdy, partner!"}
LATER = "demo:later"
"""Loaded while the servers run; the same adapter from another folder."""
KEYS = {"KT_TEST_KEY": "for requests", "KT_TEST_ADMIN_KEY": "for changes"}
PLACES = ("server.api_key=env:KT_TEST_KEY", "server.admin_key=env:KT_TEST_ADMIN_KEY")


def bearing(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("routed")
    shutil.copytree(Path(kt_launch.__file__).parent / "demo" / "west", folder / "adapters" / "later")
    words = (
        "server.replicas=2",
        "server.adapters_port=0",
        "server.playground_port=0",
        f"lora.allow=[{folder / 'adapters'}]",
        *PLACES,
    )
    env = {**KEYS, "http_proxy": "http://127.0.0.1:9"}  # leads nowhere; servers and router are asked without it
    with launched(*words, "proof.whole_model=off", runs=folder / "runs", env=env) as running:
        running.client.headers.update(bearing("KT_TEST_KEY"))
        yield running


def adapters(running: Running) -> dict[str, int]:
    """Name -> how many servers have it, as the command tells it."""
    words = ("adapters", f"run={running.run_folder}", "--json")
    code, out, err = finish(*words, runs=running.run_folder.parent.parent / "elsewhere", env=KEYS)
    assert code == 0, err
    return {one["name"]: len(one["servers"]) for one in json.loads(out)}


def workers(running: Running) -> list[str]:
    told = running.client.get("/workers", headers=bearing("KT_TEST_ADMIN_KEY")).json()
    return [worker["url"] for worker in told["workers"] if worker["is_healthy"]]


def chat(client: httpx.Client, model: str) -> str:
    """The answer, or the status."""
    body = {"model": model, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 16, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body)
    return answer.json()["choices"][0]["message"]["content"] if answer.is_success else str(answer.status_code)


def test_each_replica_is_proven_and_all_answer_as_the_names_say(replicas: Running) -> None:
    for number in (0, 1):
        proof = read_json(replicas.run_folder / f"replica-{number}" / "proof.json")
        assert proof["difference"]["west"] > 0
    assert len(workers(replicas)) == 2
    for model, answer in ANSWERS.items():
        assert chat(replicas.client, model).startswith(answer)


def test_an_adapter_that_is_loaded_once_is_on_all(replicas: Running) -> None:
    port = next(line for line in replicas.output if line.startswith("adapters: ")).removeprefix("adapters: ")
    folder = replicas.run_folder.parent.parent / "adapters" / "later"
    asked = {"lora_name": "later", "lora_path": str(folder)}
    with httpx.Client(base_url=port, timeout=120, trust_env=False, limits=ALONE) as client:
        refused = client.post("/load_lora_adapter", json=asked, headers=bearing("KT_TEST_KEY"))
        elsewhere = {"lora_name": "later", "lora_path": str(replicas.run_folder)}
        unlike = client.post("/load_lora_adapter", json=elsewhere, headers=bearing("KT_TEST_ADMIN_KEY"))
        loaded = client.post("/load_lora_adapter", json=asked, headers=bearing("KT_TEST_ADMIN_KEY"))
    assert (refused.status_code, unlike.status_code, loaded.status_code) == (401, 400, 200), loaded.text
    assert unlike.json()["error_message"].startswith("later was not loaded, no server has it. ")
    assert loaded.json()["adapter"]["proof"]["acts"] and len(loaded.json()["servers"]) == 2
    assert adapters(replicas) == {"west": 2, "later": 2}
    for _ in range(4):
        assert chat(replicas.client, LATER).startswith(ANSWERS["demo:west"])


def test_a_chat_reaches_every_adapter(replicas: Running) -> None:
    words = ("chat", f"run={replicas.run_folder}", "chat.adapter=later", "chat.max_tokens=16", "chat.temperature=0")
    elsewhere = replicas.run_folder.parent.parent / "elsewhere"
    with (elsewhere / "stderr.txt").open("w") as errors:
        said = subprocess.run(
            [str(KT_LAUNCH), *words],
            input=f"{ASKED}\n",
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **KEYS},
            text=True,
            timeout=300,
        )
    pages = [read_json(replicas.run_folder / f"replica-{n}" / "state.json")["playground_url"] for n in (0, 1)]
    assert pages[0] and not pages[1]
    assert said.returncode == 0 and said.stdout.startswith(ANSWERS["demo:west"]), (elsewhere / "stderr.txt").read_text()


def test_without_the_key_the_router_tells_no_more_than_it_is_said_to(replicas: Running) -> None:
    told = (replicas.run_folder.parent / "stderr.txt").read_text()
    assert "the router tells the base model's name (/v1/models) and the number of servers to anybody" in told
    with httpx.Client(base_url=replicas.client.base_url, timeout=60, trust_env=False, limits=ALONE) as stranger:
        assert [model["id"] for model in stranger.get("/v1/models").json()["data"]] == ["demo"]
        assert {*stranger.get("/get_server_info").json()} == {"router_manager", "routers_count", "workers_count"}
        for path in ("/workers", "/v1/loads", "/get_model_info", "/server_info"):
            assert stranger.get(path).status_code in (401, 404), path
        assert chat(stranger, "demo") == "401"


def test_a_replica_that_is_killed_under_load_is_started_again_and_nothing_wrong_is_answered(replicas: Running) -> None:
    answers: Counter[tuple[str, str]] = Counter()
    over = threading.Event()

    def ask(model: str) -> None:
        with httpx.Client(base_url=replicas.client.base_url, timeout=60, headers=replicas.client.headers) as client:
            while not over.is_set():
                answers[model, chat(client, model)[:12]] += 1

    threads = [threading.Thread(target=ask, args=(model,)) for model in ANSWERS for _ in range(2)]
    for thread in threads:
        thread.start()
    state = read_json(replicas.run_folder / "replica-0" / "state.json")
    psutil.Process(state["server"]["pid"]).kill()
    wait_until(lambda: len(workers(replicas)) == 1)
    wait_until(lambda: len(workers(replicas)) == 2, timeout_s=300)
    time.sleep(2.0)
    over.set()
    for thread in threads:
        thread.join()
    wrong = {asked: count for asked, count in answers.items() if not ANSWERS[asked[0]].startswith(asked[1])}
    assert sum(wrong.values()) <= len(threads), f"more than the requests in flight: {wrong}"
    assert all(said[1].isdecimal() for said in wrong), f"answered, but wrong: {wrong}"
    assert len(read_json(replicas.run_folder / "replica-0" / "state.json")["attempts"]) == 2
    assert adapters(replicas) == {"west": 2, "later": 2}


def test_servers_that_run_already_are_put_behind_one_address(replicas: Running, tmp_path: Path) -> None:
    process = start("route", f"workers=[{','.join(workers(replicas))}]", *PLACES, runs=tmp_path, env=KEYS)
    assert process.stdout is not None
    try:
        said = [line.strip() for line in (process.stdout.readline(), process.stdout.readline())]
        assert said[1:] == ["ask:   demo, demo:later, demo:west"], (tmp_path / "stderr.txt").read_text()
        url = said[0].removeprefix("ready: ")
        with httpx.Client(base_url=url, timeout=60, headers=bearing("KT_TEST_KEY")) as client:
            assert chat(client, "demo:west").startswith(ANSWERS["demo:west"])
    finally:
        process.terminate()
        assert process.wait(30) == 130


def test_the_end_leaves_no_process(replicas: Running) -> None:
    processes = psutil.Process(replicas.process.pid).children(recursive=True)
    assert replicas.stop() == 130
    assert wait_gone(processes) == []
    assert json.loads((replicas.run_folder / "state.json").read_text())["state"] == "ended"
