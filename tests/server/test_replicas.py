"""Two data-parallel replicas with an adapter: each is proven by itself, and each answers as the name says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from launching import Running, launched, read_json

pytestmark = pytest.mark.server
BOUND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
"""Stock SGLang wants a NUMA node a rank, unless it is told which CPUs are whose."""
NEW = {"/load_lora_adapter": {"lora_name": "later"}}
CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    words = ("server.extra_args=[--dp-size,2]", "kt.cpuinfer=1")
    with launched(*words, runs=tmp_path_factory.mktemp("replicas"), env=BOUND) as running:
        yield running


def test_each_replica_was_proven(replicas: Running) -> None:
    assert any("ran in kt_kernels" in line and line.endswith(" in each of 2 replicas") for line in replicas.output)
    proof = read_json(replicas.run_folder / "proof.json")
    assert proof["schedulers"] == 2
    assert set(proof["content"]["whole_model"]["together"]) == {"base", "west"}
    states = [state["kt_launch"] for state in replicas.client.get("/server_info").json()["internal_states"]]
    assert len({state["pid"] for state in states}) == 2
    assert all(layer["adapter_tokens"] > 0 for state in states for layer in state["layers"])
    assert all(len(state["layers"][0]["reference_error"]) == 2 for state in states)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_replica_answers_as_the_name_says(replicas: Running, rank: int) -> None:
    said = {}
    for name in ("demo", "demo:west"):
        header = {"X-Data-Parallel-Rank": str(rank)}
        answer = replicas.client.post("/v1/chat/completions", json={"model": name, **CHAT}, headers=header).json()
        assert answer["model"] == name
        said[name] = answer["choices"][0]["message"]["content"]
    assert said["demo:west"].startswith("Howdy") and not said["demo"].startswith("Howdy")


@pytest.mark.parametrize(("path", "status"), [("/load_lora_adapter", 400), ("/unload_lora_adapter", 501)])
def test_adapters_do_not_come_and_go(replicas: Running, path: str, status: int) -> None:
    """SGLang answers with a failed assertion."""
    folder = replicas.client.get("/v1/models/west").json()["root"]
    answer = replicas.client.post(path, json={"lora_name": "west", "lora_path": folder} | NEW.get(path, {}))
    assert (answer.status_code, "of several replicas (--dp-size)" in answer.text) == (status, True), answer.text
