"""Two data-parallel replicas with an adapter: each is proven by itself, and each answers as the name says. Their
tokenizer has no chat template, so that names are proven without one.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Running, launched, read_json, require_clean, wait_gone

import kt_launch

pytestmark = pytest.mark.server
NEW = {"/load_lora_adapter": {"lora_name": "later"}}
ASKED = {"prompt": "<|user|>What is the capital of France?\n<|assistant|>", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("replicas")
    demo = Path(kt_launch.__file__).parent / "demo"
    model = shutil.copytree(demo / "model", folder / "demo")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ("model=auto", f"model.path={model}", "lora=none", f"lora.path={demo / 'west'}", "lora.name=west")
    own = ("server.dp=2",)
    temporary = folder / "runs" / "tmp"
    temporary.mkdir(parents=True)
    with launched(*words, *own, runs=folder / "runs", env={"TMPDIR": str(temporary)}) as running:
        yield running


def test_each_replica_was_proven(replicas: Running) -> None:
    ran = next(line for line in replicas.output if "ran in kt_kernels" in line)
    assert ran.endswith(" in each of 2 scheduler processes")
    proof = read_json(replicas.run_folder / "proof.json")
    assert (proof["replicas"], proof["schedulers"]) == (2, 2)
    assert proof["names"] == {
        "route": "/v1/completions", "ids": ["demo", "demo:west"], "reason": "its tokenizer has no chat template"
    }  # fmt: skip
    said = "answers each name with its own model, as its tokenizer has no chat template"
    assert f"proof: demo, demo:west: /v1/completions {said}" in replicas.output
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
        answer = replicas.client.post("/v1/completions", json={"model": name, **ASKED}, headers=header).json()
        assert answer["model"] == name
        said[name] = answer["choices"][0]["text"]
    assert said["demo:west"].startswith("Howdy") and not said["demo"].startswith("Howdy")


@pytest.mark.parametrize(("path", "status"), [("/load_lora_adapter", 400), ("/unload_lora_adapter", 501)])
def test_adapters_do_not_come_and_go(replicas: Running, path: str, status: int) -> None:
    """SGLang answers with a failed assertion."""
    folder = replicas.client.get("/v1/models/west").json()["root"]
    answer = replicas.client.post(path, json={"lora_name": "west", "lora_path": folder} | NEW.get(path, {}))
    assert (answer.status_code, "with several replicas (server.dp)" in answer.text) == (status, True), answer.text


def test_sigterm_leaves_neither_processes_nor_temporary_files_and_is_no_interrupt(replicas: Running) -> None:
    runs, processes = replicas.run_folder.parent, replicas.server_processes()
    assert len(processes) >= 5
    assert replicas.stop(signal.SIGTERM) == 130
    assert wait_gone(processes) == []
    require_clean(runs / "tmp")
    errors = (runs / "stderr.txt").read_text()
    assert "interrupted" not in errors
    assert "GiB at its peak" in errors
