"""How a launch ends when something goes wrong, and that nothing is left behind.

A server without its detokenizer is in tests/adapters/test_served.py, one without its launcher in test_ranks.py, as the
last of what these servers are for; one that does not come up is in tests/bench/test_bench.py, and an adapter that does
nothing fails the proof in test_demo.py. The tests marked nightly show the last two by launches of their own.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from endings import require_end_without_main
from launching import Running, finish, launched, start, wait_gone, wait_until
from other_plugin import write_plugin
from safetensors.torch import load_file, save_file

from kt_launch.runs.state import read_state

pytestmark = pytest.mark.server
DEADLOCK = """
import os, threading
from pathlib import Path

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    target = "sglang.srt.managers.detokenizer_manager.DetokenizerManager.handle_batch_token_id_out"
    HookRegistry.register(target, wait, HookType.BEFORE)

def wait(*_, **__):
    lock = threading.Lock()
    lock.acquire()
    if Path(os.environ["DEADLOCK"]).exists():
        lock.acquire()
"""
BARE = ("lora=none", "proof.whole_model=off")


def demo_adapter() -> Path:
    import kt_launch

    return Path(kt_launch.__file__).parent / "demo" / "west"


def require_no_room(running: Running) -> None:
    """A server that was started without room for adapters says how to start it with some."""
    body = {"lora_name": "west", "lora_path": str(demo_adapter())}
    answer = running.client.post("/load_lora_adapter", json=body)
    message = (
        "lora_path: this server has no capacity for adapters. "
        "Start it with lora.allow=[/path/to/adapters], and lora.max_rank for ranks above 16."
    )
    assert (answer.status_code, answer.json()["error_message"]) == (400, message)


def test_a_killed_main_process_takes_its_children_along(tmp_path: Path) -> None:
    with launched(*BARE, runs=tmp_path) as running:
        require_no_room(running)
        assert json.loads((running.run_folder / "proof.json").read_text())["listener"] == "a process of this start"
        require_end_without_main(running)


@pytest.mark.nightly
def test_an_adapter_whose_b_is_zero_fails_the_proof(tmp_path: Path) -> None:
    adapter = tmp_path / "zero"
    shutil.copytree(demo_adapter(), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeroed = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    save_file(zeroed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    code, _, errors = finish("lora=none", f"lora.path={adapter}", "lora.name=zero", runs=tmp_path / "runs")
    assert code == 4, errors
    assert "lora.zero: base and adapter give the same first-token logprobs" in errors
    assert "Traceback" not in errors


@pytest.mark.nightly
def test_a_server_that_does_not_come_up_says_why_and_where(tmp_path: Path) -> None:
    code, _, errors = finish(*BARE, "server.extra_args=[--tokenizer-path,/no/such/folder]", runs=tmp_path)
    assert code == 3, errors
    assert "Its log is" in errors and "server.log" in errors
    assert "Traceback" not in errors
    (plan,) = tmp_path.rglob("plan.json")
    assert "--tokenizer-path" in json.loads(plan.read_text())["argv"]


def test_sigterm_while_starting_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(*BARE, runs=tmp_path)
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 130
    assert wait_gone(children) == []


@pytest.mark.nightly
def test_a_detokenizer_that_is_deadlocked_is_told_and_started_again(tmp_path: Path) -> None:
    """It lives, and nobody has stopped it; make test shows the same with a stand-in for the server."""
    locked = tmp_path / "locked"
    env = {"PYTHONPATH": str(write_plugin(tmp_path / "site", "deadlock", DEADLOCK)), "DEADLOCK": str(locked)}
    asked = {"text": "Hello", "sampling_params": {"max_new_tokens": 4}}
    words = (*BARE, "server.hang_timeout_s=9", "server.restarts=1")
    with launched(*words, runs=tmp_path / "runs", env=env) as running:
        assert running.client.post("/generate", json=asked).status_code == 200
        locked.touch()
        with pytest.raises(httpx.ReadTimeout):
            running.client.post("/generate", json=asked, timeout=5)
        wait_until(lambda: read_state(running.run_folder).now == "unresponsive")  # type: ignore[union-attr]
        locked.unlink()
        wait_until(lambda: read_state(running.run_folder).now == "ready", 240)  # type: ignore[union-attr]
        state = read_state(running.run_folder)
        assert state is not None and state.attempts[0].ending == "hung"
        assert str(state.attempts[0].cause).startswith(
            "its detokenizer has passed on nothing of what schedulers sent it"
        )
        assert running.client.post("/generate", json=asked).status_code == 200
        assert running.stop() == 130
