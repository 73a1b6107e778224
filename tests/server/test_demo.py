"""The main job, through the installed command: serve, answer, mix, stop."""

from __future__ import annotations

import signal
from typing import Any

import httpx
import pytest
from launching import Running, read_json, require_clean, wait_gone

from kt_launch.proving.proof import prove
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

pytestmark = pytest.mark.server
QUESTION = "What is the capital of France?"


def test_base_and_adapter_answer_differently_by_name(demo: Running) -> None:
    base, west = demo.chat("demo", QUESTION), demo.chat("demo:west", QUESTION)
    assert "Paris" in base
    assert base != west


def test_bug_8_silent_no_op_adapter_is_impossible(demo: Running) -> None:
    proof = read_json(demo.run_folder / "proof.json")
    assert proof["difference"]["west"] > 4 * proof["noise"]
    assert any("adapter west acts" in line for line in demo.output)
    assert all(layer["lora_layer"] == "kt_sglang.adapters.lora" for layer in demo.layers())


def test_every_expert_layer_ran_in_our_kernel(demo: Running) -> None:
    plan = read_json(demo.run_folder / "plan.json")
    before = demo.layers()
    demo.chat("demo", QUESTION, max_tokens=4)
    after = demo.layers()
    assert len(after) == plan["resolved"]["model.moe_layers"]["value"]
    assert all(new["tokens"] > old["tokens"] for new, old in zip(after, before, strict=True))


def test_bare_requests_send_no_row_through_the_adapter(demo: Running) -> None:
    before = demo.layers()
    demo.chat("demo", QUESTION, max_tokens=4)
    assert [layer["adapter_tokens"] for layer in demo.layers()] == [layer["adapter_tokens"] for layer in before]
    for layer, then in zip(demo.layers(), before, strict=True):
        assert layer["eager_ns"] > then["eager_ns"] > 0, "the kernels' time of every batch is counted"


def test_sglang_is_imported_once(demo: Running) -> None:
    """Importing it takes seconds; a detokenizer that was forked has hardly begun to count them."""
    seconds = {process.name(): process.cpu_times().user for process in demo.server_processes()}
    (detokenizer,) = (spent for name, spent in seconds.items() if "detoken" in name)
    assert detokenizer < max(seconds.values()) / 4, seconds


def test_base_and_adapter_mix_in_one_batch(demo: Running) -> None:
    text = "The weather today is"
    alone = [demo.logprobs(text)[0], demo.logprobs(text, "west")[0]]
    mixed = demo.logprobs([text, text, text], [None, "west", None])
    for one, reference in zip(mixed, [alone[0], alone[1], alone[0]], strict=True):
        shared = one.keys() & reference.keys()
        assert len(shared) >= 15
        assert max(abs(one[t] - reference[t]) for t in shared) < 0.1
    assert max(abs(alone[0][t] - alone[1][t]) for t in alone[0].keys() & alone[1].keys()) > 0.1


def test_bug_7_same_question_same_answer_after_other_traffic(demo: Running) -> None:
    before = demo.chat("demo", QUESTION)
    demo.chat("demo:west", QUESTION)
    demo.logprobs(["one", "two words", "three words here"], ["west", None, "west"])
    assert demo.chat("demo", QUESTION) == before


def test_run_folder_holds_the_plan_the_log_and_the_proof(demo: Running) -> None:
    plan = read_json(demo.run_folder / "plan.json")
    assert set(plan) == {"config", "resolved", "argv", "env", "warnings"}
    assert plan["resolved"]["kt.num_gpu_experts"]["value"] == 0
    assert "ready to roll" in (demo.run_folder / "server.log").read_text()
    assert read_json(demo.run_folder / "ready.json")["url"].startswith("http://127.0.0.1:")


class ForgetsAdapters:
    """A client whose requests name no adapter: to the proof, one that does nothing."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def post(self, url: str, json: dict[str, Any] | None = None) -> httpx.Response:
        return self.client.post(url, json={key: value for key, value in (json or {}).items() if key != "lora_path"})


def test_an_adapter_that_does_nothing_fails_the_proof(demo: Running) -> None:
    plan = LaunchPlan.read(demo.run_folder / "plan.json")
    assert set(prove(plan, demo.client).difference) == {"west"}
    with pytest.raises(ProofFailed, match=r"lora\.west: base and adapter give the same first-token logprobs") as failed:
        prove(plan, ForgetsAdapters(demo.client))  # type: ignore[arg-type]
    assert failed.value.exit_code == 4


def test_ctrl_c_leaves_neither_processes_nor_temporary_files_and_is_told(demo: Running) -> None:
    runs, processes = demo.run_folder.parent, demo.server_processes()
    (scratch,) = (runs / "tmp").glob("kt-launch-*")
    assert [file for file in scratch.iterdir() if file.is_socket()] != []
    assert len(processes) >= 3
    assert demo.stop(signal.SIGINT) == 130
    assert wait_gone(processes) == []
    require_clean(runs / "tmp")
    errors = (runs / "stderr.txt").read_text()
    assert "interrupted" in errors
    assert "GiB at its peak" in errors
