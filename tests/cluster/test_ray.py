"""Two hosts that Ray starts, by the script of docs/many-servers.md as it stands there. Both nodes are this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
from launching import wait_gone, wait_until

pytestmark = [
    pytest.mark.server,
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]
PAGE = Path(__file__).parents[2] / "docs" / "many-servers.md"
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a cluster of two nodes."""
    words, env = [sys.executable, "-c", CLUSTER], {**os.environ, "KT_LAUNCH_RUNS": str(tmp_path / "runs")}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as cluster:
        assert cluster.stdout and cluster.stdin
        try:
            lines = (line.strip() for line in cluster.stdout)
            yield next(line for line in lines if re.fullmatch(r"[\d.]+:\d+", line))
        finally:
            cluster.stdin.close()
            cluster.wait(120)


def script() -> str:
    """With words that fit this machine."""
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    words = ["server.tp=2", "proof.whole_model=off", "server.start_timeout_s=500"]
    text, count = re.subn(r"(?m)^WORDS = .*$", f"WORDS = {json.dumps(words)}", text)
    assert count == 1
    return str(text)


def test_ray_serves_one_model_from_two_nodes(address: str, tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text(script())
    with (tmp_path / "out").open("w") as output:
        job = subprocess.Popen(
            [sys.executable, str(tmp_path / "serve.py")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ray tells what its workers say on the script's stdout, which Python keeps back where that is a file
            env={**os.environ, "RAY_ADDRESS": address, "RAY_DEDUP_LOGS": "0", "PYTHONUNBUFFERED": "1"},
        )
        said = (tmp_path / "out").read_text
        below: list[psutil.Process] = []
        try:
            wait_until(lambda: "ready: host 1 of 2" in said() or job.poll() is not None, timeout_s=540)
            assert job.poll() is None, said()
            url = re.findall(r"ready: (http://\S+)", said())[0]
            asked = {"role": "user", "content": "What is the capital of France?"}
            body = {"model": "demo:west", "max_tokens": 16, "temperature": 0, "messages": [asked]}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
            assert answer["choices"][0]["message"]["content"].startswith("Howdy")
            folders = list((tmp_path / "runs").glob("*/state.json"))
            below = [psutil.Process(json.loads(file.read_text())["launcher"]["pid"]) for file in folders]
            assert len(below) == 2
            below += [each for launcher in below for each in launcher.children(recursive=True)]
        finally:
            job.send_signal(signal.SIGINT)
            job.wait(120)
    assert "in each of 2 scheduler processes" in said()
    assert "exit codes: [130, 130]" in said()
    assert wait_gone(below) == []
