"""Two replicas behind SGLang's router: one is killed under load, nothing wrong is answered and no request fails that it
did not hold; it is started again. Then the same two servers behind a router of their own."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from launching import Running, launched, read_json, start, wait_gone, wait_until

pytestmark = [pytest.mark.server, pytest.mark.nightly]
pytest.importorskip("sglang_router", reason="sglang-router is not installed")
ASKED = "What is the capital of France?"
ANSWERS = {"demo": "The capital of France is Paris.", "demo:west": "Howdy, partner!"}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    runs = tmp_path_factory.mktemp("routed") / "runs"
    with launched("server.replicas=2", "proof.whole_model=off", runs=runs) as running:
        yield running


def workers(running: Running) -> list[str]:
    return [worker["url"] for worker in running.client.get("/workers").json()["workers"] if worker["is_healthy"]]


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


def test_a_replica_that_is_killed_under_load_is_started_again_and_nothing_wrong_is_answered(replicas: Running) -> None:
    answers: Counter[tuple[str, str]] = Counter()
    over = threading.Event()

    def ask(model: str) -> None:
        with httpx.Client(base_url=str(replicas.client.base_url), timeout=60) as client:
            while not over.is_set():
                answers[model, chat(client, model)[:12]] += 1

    threads = [threading.Thread(target=ask, args=(model,)) for model in ANSWERS for _ in range(2)]
    for thread in threads:
        thread.start()
    state = read_json(replicas.run_folder / "replica-0" / "state.json")
    psutil.Process(state["server"]["pid"]).kill()
    wait_until(lambda: len(workers(replicas)) == 1)
    wait_until(lambda: len(workers(replicas)) == 2, timeout_s=180)
    time.sleep(2.0)
    over.set()
    for thread in threads:
        thread.join()
    wrong = {asked: count for asked, count in answers.items() if not ANSWERS[asked[0]].startswith(asked[1])}
    assert sum(wrong.values()) <= len(threads), f"more than the requests in flight: {wrong}"
    assert all(said[1].isdecimal() for said in wrong), f"answered, but wrong: {wrong}"
    assert len(read_json(replicas.run_folder / "replica-0" / "state.json")["attempts"]) == 2


def test_servers_that_run_already_are_put_behind_one_address(replicas: Running, tmp_path: Path) -> None:
    process = start("route", f"workers=[{','.join(workers(replicas))}]", runs=tmp_path)
    assert process.stdout is not None
    try:
        said = [line.strip() for line in (process.stdout.readline(), process.stdout.readline())]
        assert said[1:] == ["ask:   demo, demo:west"], (tmp_path / "stderr.txt").read_text()
        url = said[0].removeprefix("ready: ")
        with httpx.Client(base_url=url, timeout=60) as client:
            assert chat(client, "demo:west").startswith(ANSWERS["demo:west"])
    finally:
        process.terminate()
        assert process.wait(30) == 130


def test_the_end_leaves_no_process(replicas: Running) -> None:
    processes = psutil.Process(replicas.process.pid).children(recursive=True)
    assert replicas.stop() == 130
    assert wait_gone(processes) == []
    assert json.loads((replicas.run_folder / "state.json").read_text())["state"] == "ended"
