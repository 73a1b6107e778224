"""One command for two hosts: Slurm starts it on both, and tells each which it is. Both nodes are this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
import slurm
from launching import KT_LAUNCH, wait_until

pytestmark = [pytest.mark.server, pytest.mark.nightly]


@pytest.mark.skipif(bool(slurm.missing_programs()) or not shutil.which("srun"), reason="Slurm is not installed")
def test_srun_serves_one_model_from_two_nodes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"  # both nodes are here, and have no names that resolve
    words = ["server.tp=2", "server.nodes=2", f"server.rendezvous={meeting}", "proof.whole_model=off"]
    with slurm.cluster(tmp_path / "slurm", ("one", "two")) as env, (tmp_path / "out").open("w") as output:
        job = subprocess.Popen(
            ["srun", "--label", "--nodes", "2", "--ntasks-per-node", "1", str(KT_LAUNCH), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env, "KT_LAUNCH_RUNS": str(tmp_path / "runs")},
        )
        said = (tmp_path / "out").read_text
        try:
            wait_until(lambda: "1: ready: host 1 of 2" in said() or job.poll() is not None, timeout_s=300)
            assert job.poll() is None, said()
            url = said().split("0: ready: ")[1].splitlines()[0]
            body = {"model": "demo:west", "max_tokens": 16, "temperature": 0}
            body |= {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["message"]["content"].startswith("Howdy")
        finally:
            job.send_signal(signal.SIGTERM)
            job.wait(120)
    assert "in each of 2 scheduler processes" in said()
