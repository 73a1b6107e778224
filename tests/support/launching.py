"""Starting `kt-launch` as a person does and talking to its server; shared by the served tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from kt_launch.watching.client import ALONE

KT_LAUNCH = Path(sys.executable).with_name("kt-launch")
TOP = 20
LONG_S = 240.0
"""Within which anything that works comes to its end, also where the machine does much else at the same time."""


@dataclass
class Running:
    """A server that said ready. pid is the launcher's."""

    process: subprocess.Popen[str]
    client: httpx.Client
    run_folder: Path
    output: list[str]

    def logprobs(
        self, prompt: str | list[str] | list[int], adapter: str | list[str | None] | None = None
    ) -> list[dict[int, float]]:
        """Per prompt (texts, or the tokens of one): token id → logprob of the TOP most probable first tokens, without
        cached prefixes."""
        self.client.post("/flush_cache")
        tokens = isinstance(prompt, list) and isinstance(prompt[0], int)
        body = {
            "input_ids" if tokens else "text": prompt,
            "lora_path": adapter,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "top_logprobs_num": TOP,
        }
        answer = self.client.post("/generate", json=body)
        answer.raise_for_status()
        found = answer.json()
        found = found if isinstance(found, list) else [found]
        return [{t: p for p, t, _ in one["meta_info"]["output_top_logprobs"][0]} for one in found]

    def chat(self, model: str, question: str, max_tokens: int = 48) -> str:
        """The greedy answer over the OpenAI API."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        answer = self.client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        content: str = answer.json()["choices"][0]["message"]["content"]
        return content

    def layers(self) -> list[dict[str, Any]]:
        """The scheduler's records, one a MoE layer."""
        state = self.client.get("/server_info").json()["internal_states"][0]
        layers: list[dict[str, Any]] = state["kt_launch"]["layers"]
        return layers

    def server_processes(self) -> list[psutil.Process]:
        """Everything below the launcher."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Signal the launcher and wait for its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=LONG_S)


def start(
    *overrides: str, runs: Path, env: dict[str, str] | None = None, command: Path = KT_LAUNCH
) -> subprocess.Popen[str]:
    """Start the installed command in a folder that holds nothing, with its run folders under `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [str(command), *overrides],
        cwd=runs,
        env={**os.environ, "KT_LAUNCH_RUNS": str(runs), "KT_LAUNCH_CACHE": str(runs / "cache"), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=(runs / "stderr.txt").open("a"),
        text=True,
    )


def finish(
    *overrides: str, runs: Path, timeout: float = 400, env: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Run the command to its end: exit code, stdout, stderr."""
    (runs / "stderr.txt").unlink(missing_ok=True)
    process = start(*overrides, runs=runs, env=env)
    with ended_with_the_test(process):
        out, _ = process.communicate(timeout=timeout)
    return process.returncode, out, (runs / "stderr.txt").read_text()


@contextlib.contextmanager
def launched(
    *overrides: str, runs: Path, env: dict[str, str] | None = None, command: Path = KT_LAUNCH
) -> Iterator[Running]:
    """A running server; stopped by SIGINT at the end unless the test has stopped it."""
    process = start(*overrides, runs=runs, env=env, command=command)
    try:
        yield _wait_ready(process, runs)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a launcher that was told to end; one that does not is killed, and its server goes with it."""
    try:
        process.wait(timeout=LONG_S)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _wait_ready(process: subprocess.Popen[str], runs: Path) -> Running:
    assert process.stdout is not None
    output: list[str] = []
    run_folder = runs
    for line in process.stdout:
        output.append(line.rstrip("\n"))
        if line.startswith("run: "):
            run_folder = Path(line.removeprefix("run: ").strip())
        if line.startswith("ready: "):
            url = line.removeprefix("ready: ").strip()
            client = httpx.Client(base_url=url, timeout=LONG_S, trust_env=False, limits=ALONE)
            return Running(process, client, run_folder, output)
    log = run_folder / "server.log"
    tail = log.read_text()[-3000:] if log.exists() else ""
    raise AssertionError(f"not ready, exit code {process.wait()}:\n{(runs / 'stderr.txt').read_text()}\n{tail}")


def wait_gone(processes: list[psutil.Process], timeout_s: float = LONG_S) -> list[psutil.Process]:
    """Those that still live when the time is over."""
    return psutil.wait_procs(processes, timeout=timeout_s)[1]


def require_clean(temporary: Path) -> None:
    """Nothing of a launch is left in its folder for temporary files; what torch compiled is kept for all processes."""
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


@contextlib.contextmanager
def ended_with_the_test(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """The process, waited for at the end as subprocess.Popen does, but killed first if the block has failed.

    Popen's own `with` waits for a process that a failed test has told nothing, until the test's time is up.
    """
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def wait_until(condition: Any, timeout_s: float = LONG_S) -> None:
    """Poll until `condition()` holds; fails the test when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.2)


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    return json.loads(path.read_text())
