"""`from kt_launch import Server`: the launcher's process, its files and its HTTP are real, the server stands in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ended_with_the_test, wait_gone, wait_until
from tiny_files import write_adapter, write_checkpoint

import kt_launch
from kt_launch import LaunchError, LaunchErrors, Server, ServerDidNotStart

Operations = Any
KEYS: dict[str, Any] = {
    "proof": {"whole_model": "off", "text": "warn"},
    "server": {"device": "cpu", "context_length": 64, "max_total_tokens": 64},
    "kt": {"cpuinfer": 1},
}


@pytest.fixture
def own(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keys of a launch of the stand-in."""
    write_checkpoint(operations.root / "tiny")
    write_adapter(operations.root / "west")
    for name, value in operations.environment().items():
        monkeypatch.setenv(name, value)
    adapter = {"name": "west", "path": operations.root / "west"}
    return {**KEYS, "model": {"path": operations.root / "tiny"}, "lora": [adapter]}


def test_a_block_serves_and_leaves_nothing(
    own: dict[str, Any], operations: Operations, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server("model=auto", **own) as server:
        assert server.ids == ["tiny", "tiny:west"]
        assert [model["id"] for model in server.http().get("/v1/models").json()["data"]] == server.ids
        assert [model.id for model in server.client().models.list()] == server.ids
        assert server.running and server.url in repr(server)
        assert (server.run_folder / "proof.json").is_file()
        assert server.plan.value("kt.cpuinfer") == 1
        assert len(operations.processes()) >= 3
    assert not server.running and operations.processes() == []
    said = capsys.readouterr()
    assert f"ready: {server.url}" in said.out and "proof" in said.err
    server.stop()


def test_it_starts_in_a_thread_that_ends_and_below_a_running_loop(own: dict[str, Any], operations: Operations) -> None:
    """As in a notebook, whose loop runs; the kernel's word for a dead parent comes when its *thread* ends."""
    server = Server("model=auto", quiet=True, **own)

    async def cell() -> None:
        thread = threading.Thread(target=server.start)
        thread.start()
        await asyncio.to_thread(thread.join)

    asyncio.run(cell())
    with pytest.raises(subprocess.TimeoutExpired):
        server._end.peek()[1].__self__.process.wait(2)  # type: ignore[union-attr,index]
    assert server.http().get("/v1/models").is_success
    server.stop()
    assert operations.processes() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_program(own: dict[str, Any], operations: Operations, tmp_path: Path, number: int) -> None:
    words = json.dumps(own, default=str)
    code = f"import time, json; from kt_launch import Server; s = Server('model=auto', **json.loads({words!r}))\n"
    code += "with s: print('up', flush=True); time.sleep(600)"
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    with ended_with_the_test(started) as running:
        assert running.stdout is not None
        assert any(line == "up\n" for line in running.stdout)
        below = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(number)
        assert running.wait(300) != 0
    assert wait_gone(below) == []


def test_what_the_launcher_met_is_raised(own: dict[str, Any], operations: Operations) -> None:
    os.environ["STAND_IN"] = json.dumps({"log": "torch.OutOfMemoryError: CUDA out of memory", "exit": 1})
    with pytest.raises(ServerDidNotStart, match=r"the server ended \(exit code 1\)") as failed:
        Server("model=auto", quiet=True, **own).start()
    assert failed.value.exit_code == 3
    assert operations.processes() == []


def test_a_server_that_was_not_started_says_so() -> None:
    with pytest.raises(LaunchError, match="it was not started"):
        _ = Server().url


def test_without_openai_it_says_what_to_install(
    own: dict[str, Any], operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    server = Server("model=auto", **own)
    monkeypatch.setattr(server, "_url", "http://127.0.0.1:1")
    with pytest.raises(LaunchError, match=r"openai is not installed.*pip install openai, or use Server\.http"):
        server.client()


def test_mistakes_are_raised_together_before_anything_starts(operations: Operations) -> None:
    with pytest.raises(LaunchErrors) as failed:
        kt_launch.plan(kt={"cpuinfer": "sixty"}, server={"prot": 1})
    assert {error.where for error in failed.value.errors} == {"kt.cpuinfer", "server.prot"}
    assert not operations.runs.exists()


@pytest.fixture(autouse=True)
def without_stand_in_behaviour() -> Any:
    yield
    wait_until(lambda: os.environ.pop("STAND_IN", None) is None)
