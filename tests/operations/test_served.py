"""One real server with a key, metrics and one restart, after which it maps the experts that it packed before: what the
stand-in cannot prove."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from launching import wait_until

from kt_launch.exports.grafana import write_dashboard
from kt_launch.machine.processes import command_of
from kt_launch.runs.state import read_state
from kt_model.weights.packed import read_entry

pytestmark = pytest.mark.server
Operations = Any
KEY = "sk-not-for-logs"


def wait_for_second_start(folder: Any) -> Any:
    """The state once a second server is ready."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state = read_state(folder)
        if state is not None and len(state.attempts) == 2 and state.state == "ready":
            return state
        time.sleep(0.5)
    raise AssertionError((folder / "launcher.log").read_text())


def scheduler_of(client: httpx.Client) -> Any:
    """What it says of itself."""
    return client.get("/server_info").raise_for_status().json()["internal_states"][0]["kt_launch"]


def answers(client: httpx.Client) -> list[Any]:
    """Of the base and the adapter: tokens, and their exact logprobs."""
    sampling = {"max_new_tokens": 8, "temperature": 0}
    asked = {"text": "The quick brown fox jumps over", "sampling_params": sampling, "return_logprob": True}
    told = [client.post("/generate", json={**asked, "lora_path": name}).raise_for_status() for name in (None, "west")]
    return [answer.json()["meta_info"]["output_token_logprobs"] for answer in told]


def require_packed(client: httpx.Client) -> None:
    """Of a first start, which fills the cache while it serves."""
    assert not any(layer["mapped"] for layer in scheduler_of(client)["layers"])
    assert scheduler_of(client)["unread_tensors"] == 0
    wait_until(lambda: scheduler_of(client)["packed_cache"]["state"] == "written")
    own = scheduler_of(client)
    entry = read_entry(Path(own["packed_cache"]["entry"]))
    assert entry.layers == [layer["layer"] for layer in own["layers"]]
    assert entry.bytes >= sum(layer["packed_bytes"] for layer in own["layers"])


def require_mapped(client: httpx.Client, server: int, said: str) -> None:
    """Of the next start, whose main process is `server`."""
    own = scheduler_of(client)
    layers = own["layers"]
    assert own["packed_cache"]["state"] == "mapped" and all(layer["mapped"] for layer in layers)
    assert own["unread_tensors"] == 3 * sum(layer["experts"] for layer in layers) > 0
    maps = [file.path for process in psutil.Process(server).children(recursive=True) for file in process.memory_maps()]
    files = {Path(path).name for path in maps if "/packed/" in path}
    assert files == {f"layer-{layer['layer']:05d}.safetensors" for layer in layers}
    assert f"{len(layers)} layers are mapped from the packed cache: " in said


def test_key_metrics_restart_packed_cache_and_replay(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")  # the plugin itself, no stand-in
    words = ("detach=true", "server.metrics_port=0", "server.restarts=1", f"server.extra_args=[--api-key,{KEY}]",
             "proof.whole_model=off")  # fmt: skip
    done = operations.call(*words, timeout=900)
    assert done.returncode == 0, done.stderr
    run = operations.latest()
    with httpx.Client(base_url=run.url, trust_env=False, timeout=120) as client:
        assert client.get("/v1/models").status_code == 401
        assert [client.get(path).status_code for path in ("/ready", "/health")] == [200, 200], "probes have no key"
        assert client.post("/pause_generation", json={}).status_code == 401
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        opened = client.get("/v1/realtime", headers={**upgrade, "Sec-WebSocket-Key": "MTIzNDU2Nzg5MDEyMzQ1Ng=="})
        assert opened.status_code in (401, 403), "an ordinary request where no library for websockets is installed"
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        assert KEY not in client.get("/server_info", headers=bearer).raise_for_status().text
        assert client.post("/flush_cache", headers=bearer).status_code == 401
        assert client.post("/unload_lora_adapter", json={"lora_name": "west"}, headers=bearer).status_code == 401
        assert client.post("/open_session", json={"capacity_of_str_len": 9}, headers=bearer).status_code == 401
        written = {"model": "demo", "prompt": "Hello", "max_tokens": 8, "stream": True, "ignore_eos": True}
        assert "[DONE]" in client.post("/v1/completions", json=written, headers=bearer).text
        stranger = {**bearer, "Origin": "https://evil.example.com"}
        refused = client.get("/v1/models", headers=stranger)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)
        client.headers.update(bearer)
        require_packed(client)
        first = answers(client)
    page = httpx.get(run.record.metrics_url, trust_env=False, timeout=120).text
    assert 'kt_launch_expert_weight_bytes_total{phase="gate_up",scheduler="0"}' in page
    (spent,) = [line for line in page.splitlines() if line.startswith("kt_launch_expert_phase") and "gate_up" in line]
    assert float(spent.rpartition(" ")[2]) > 0
    assert "kt_launch_adapters_loaded 1" in page
    asked = set(re.findall(r"\b(?:kt_launch_|sglang:)\w+", write_dashboard()))
    assert asked - {line.partition("{")[0].partition(" ")[0] for line in page.splitlines()} == set()
    assert "'***'" in (run.folder / "server.log").read_text()

    schedulers = psutil.Process(run.record.server.pid).children(recursive=True)
    (scheduler,) = [process for process in schedulers if "scheduler" in command_of(process)]
    scheduler.send_signal(signal.SIGKILL)
    state = wait_for_second_start(run.folder)
    assert "a process of the server was killed" in state.attempts[0].cause
    told = "the server ended unexpectedly (SGLang stopped it): a process of the server was killed"
    assert told in (run.folder / "launcher.log").read_text()
    with httpx.Client(base_url=state.url, headers=bearer, trust_env=False, timeout=120) as client:
        require_mapped(client, state.server.pid, (run.folder / "launcher.log").read_text())
        assert answers(client) == first
    assert operations.call("action=stop").stdout == f"{run.name}: stopped\n"
    assert operations.processes() == []
    files = [file for file in run.folder.iterdir() if file.is_file()]
    assert [file.name for file in files if KEY.encode() in file.read_bytes()] == []

    again = operations.call("action=replay", "replay.start=false")
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith("differs: ")] == [
        "differs: environment KT_LAUNCH_API_KEY: (set, not recorded) then, absent now"
    ]
    assert set(json.loads((run.folder / "timings.json").read_text())) >= {"weights", "warm-up", "ready"}
