"""One real server with a key, metrics and one restart: what the stand-in cannot prove."""

from __future__ import annotations

import json
import re
import signal
import time
from typing import Any

import httpx
import psutil
import pytest

from kt_launch.exports.grafana import write_dashboard
from kt_launch.machine.processes import command_of
from kt_launch.runs.state import read_state

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


def test_key_metrics_restart_and_replay(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
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
