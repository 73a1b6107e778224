"""Two hosts, each a network namespace of the test's own with a cable between them: they answer as one host does, and
when the cable is cut in the middle of a request both end within the stated time and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launching import KT_LAUNCH, wait_gone, wait_until

from kt_launch.cluster.peer import LOST_S

pytestmark = [pytest.mark.server, pytest.mark.nightly]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
NAMES = ("kt-launch-test-0", "kt-launch-test-1")
PORT = 30055
ASKED = "What is the capital of France?"
ANSWERS = {"demo": "The capital of France is Paris.", "demo:west": "Howdy"}


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[None]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"no network namespaces here: {refused.stderr}")
    try:
        ip("link", "add", "ktcable0", "netns", NAMES[0], "type", "veth", "peer", "name", "ktcable1", "netns", NAMES[1])
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"ktcable{number}")
            for link in ("lo", f"ktcable{number}"):
                ip("-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)


def inside(number: int, *words: str) -> list[str]:
    return ["ip", "netns", "exec", NAMES[number], *words]


def start(number: int, folder: Path) -> subprocess.Popen[str]:
    """The launcher of one host, with shared memory of its own: the same words but for its number."""
    words = ["server.tp=2", "server.nodes=2", f"server.node_rank={number}", f"server.rendezvous={ADDRESSES[0]}:29533"]
    words += [f"server.port={PORT}", "server.start_timeout_s=300", "proof.whole_model=off"]
    (folder / "runs").mkdir(parents=True)
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            inside(number, "sh", "-c", 'mount -t tmpfs own /dev/shm && exec "$@"', "sh", str(KT_LAUNCH), *words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "KT_LAUNCH_RUNS": str(folder / "runs")},
        )


def ask(model: str, tokens: int = 16) -> str:
    """curl's exit code and what it got, from inside host 0."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{ASKED}"}}], "max_tokens": {tokens}'
    body += f', "temperature": 0, "ignore_eos": {"true" if tokens > 100 else "false"}}}'
    url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
    done = subprocess.run(
        inside(0, "curl", "-s", url, "-H", "Content-Type: application/json", "-d", body), capture_output=True, text=True
    )
    return f"{done.returncode} {done.stdout}"


def test_they_answer_as_one_and_end_together_when_the_cable_is_cut(namespaces: None, tmp_path: Path) -> None:
    hosts = [start(number, tmp_path / f"host{number}") for number in (0, 1)]
    outputs = [tmp_path / f"host{number}" / "output" for number in (0, 1)]
    below: list[psutil.Process] = []
    try:
        wait_until(lambda: "log:" in outputs[0].read_text() or hosts[0].poll() is not None, timeout_s=300)
        assert hosts[0].poll() is None, [output.read_text() for output in outputs]
        assert "in each of 2 scheduler processes" in outputs[0].read_text()
        wait_until(lambda: "ready: host 1 of 2" in outputs[1].read_text())
        for model, answer in ANSWERS.items():
            assert answer in ask(model)
        below = [each for host in hosts for each in psutil.Process(host.pid).children(recursive=True)]
        long: list[str] = []
        asking = threading.Thread(target=lambda: long.append(ask("demo", tokens=2000)))
        asking.start()
        time.sleep(1.0)
        cut_at = time.monotonic()
        ip("-n", NAMES[1], "link", "set", "ktcable1", "down")
        asking.join(LOST_S + 60)
        assert long and not long[0].startswith('0 {"id"'), "the request was answered all the same"
        for host in hosts:
            assert host.wait(LOST_S + 60) == 3
        assert time.monotonic() - cut_at < LOST_S + 60
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert "host 1" in outputs[0].read_text() and "has been silent for 30 s" in outputs[0].read_text()
    assert "host 0 has been silent for 30 s" in outputs[1].read_text()
    assert wait_gone(below) == []
