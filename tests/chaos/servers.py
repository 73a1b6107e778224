"""Servers of the demo model: processes of theirs killed in every phase, stopped, or fed with what nobody should send;
what answers afterwards answers as at the beginning.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
from hostile import NO_ANSWER, adapters, requests
from outcomes import Outcome
from place import Command, Place, Wrong, kill, wait_until

from kt_launch.machine.processes import works
from kt_launch.runs.scratch import remove_abandoned

READY_S, END_S = 180.0, 60.0
RESTARTS = 6
PARTS = {"main": "kt_sglang.server", "scheduler": "sglang::scheduler", "detokenizer": "sglang::detokenizer"}
FLOAT32 = "kt_launch.proving.float32_run"
PHASE = re.compile(
    r"^ +[\d.]+ s  (start|import SGLang|processes|model code|weights|adapters|memory|warm-up|proof)", re.M
)
PHASES = ("start", "import SGLang", "processes", "model code", "weights", "memory", "warm-up", "proof")
PROMPTS = ("The lighthouse keeper", "Answer: ", "1 2 3 4")


class Life:
    """One launch of the demo with its adapter, and the answers that it gave when it was first ready."""

    def __init__(self, place: Place, outcome: Outcome, *words: str) -> None:
        self.place, self.outcome = place, outcome
        self.allowed = place.folder()
        own = ("server.device=cpu", f"lora.allow=[{self.allowed}]", f"server.restarts={RESTARTS}", *words)
        self.command: Command = place.spawn(*own)
        self.expected: list[Any] = []
        self._told = 0
        self._starts = 1

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        if self.command.process.poll() is None:
            self.command.signal(signal.SIGKILL)
            self.command.process.wait()

    @property
    def state(self) -> dict[str, Any]:
        found = re.search(r"^run: (.*)$", self.command.out, re.M)
        if not found:
            return {}
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(Path(found[1], "state.json").read_text())
            return content if isinstance(content, dict) else {}
        return {}

    @property
    def url(self) -> str:
        return str(self.state["url"])

    def wait_ready(self) -> None:
        """Ready, at the start that it is at by now, with the first answers."""

        def ready() -> bool:
            self._require_alive()
            return len(self.state.get("attempts", [])) >= self._starts and self.state["state"] == "ready"

        wait_until(ready, READY_S, f"ready: {self.command.err[-300:]}")
        answers = self.ask()
        self.expected = self.expected or answers
        if answers != self.expected:
            raise Wrong(f"other answers: {answers}, expected {self.expected}")

    def ask(self) -> list[Any]:
        """Greedy answers of base and adapter, with logprobs."""
        found = []
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            for model in ("demo", "demo:west"):
                for prompt in PROMPTS:
                    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
                    choice = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
                    found.append((choice["text"], choice["logprobs"]["token_logprobs"]))
        return found

    def wait_phase(self, phase: str) -> None:
        """The start that it is at by now has come so far."""

        def there() -> bool:
            self._require_alive()
            return phase in PHASE.findall(self.command.err[self._told :])

        wait_until(there, READY_S, f"the phase {phase}")

    def part(self, name: str) -> psutil.Process | None:
        found = self.command.parts(PARTS.get(name, name))
        return found[0] if found else None

    def kill(self, name: str) -> bool:
        """Whether there was such a process to kill."""
        process = self.part(name)
        if process is None:
            return False
        kill(process)
        self.outcome.kills += 1
        return True

    def expect_restart(self) -> None:
        """The cause is told, and another start follows."""
        begun = self._starts
        self._starts += 1

        def again() -> bool:
            self._require_alive()
            return len(self.state.get("attempts", [])) > begun

        wait_until(again, 120, f"a restart: {self.command.err[-300:]}")
        self._told = self.command.err.rfind("starting the server again")
        attempt = self.state["attempts"][begun - 1]
        if not attempt["ending"] or not attempt["cause"]:
            raise Wrong(f"a death without a name: {attempt}")
        self.outcome.endings["restarted"] += 1

    def end(self, number: int) -> None:
        """The launcher, by a signal; a killed one is told as lost, and takes its server with it."""
        self.command.signal(number)
        code = self.command.wait(END_S)
        if code != (-number if number == signal.SIGKILL else 130):
            raise Wrong(f"signal {number}: exit code {code}")
        if number == signal.SIGKILL:
            self.outcome.kills += 1
            done = self.place.finish("action=status", "--json")
            if json.loads(done.out).get("state") != "lost":
                raise Wrong(f"a killed launcher is not told as lost: {done.out}")
        self.outcome.endings["ended in order" if number != signal.SIGKILL else "named"] += 1

    def _require_alive(self) -> None:
        if self.command.process.poll() is not None:
            raise Wrong(f"the launcher ended with {self.command.process.returncode}: {self.command.err[-400:]}")


def first_start(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """A process killed while the server comes up for the first time: exit code 3 and the cause in one line."""
    phase, who = rng.choice(PHASES), rng.choice(("main", "scheduler", "detokenizer", "launcher", "launcher"))
    with Life(place, outcome) as life:
        life.wait_phase(phase)
        time.sleep(rng.uniform(0, 0.5))
        if who == "launcher":
            life.end(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
            return
        if not life.kill(who):
            life.kill("main")
        code = life.command.wait(120)
        if code != 3 or len(life.command.errors) != 1:
            raise Wrong(f"{who} killed at {phase}: exit code {code}, {life.command.err[-400:]}")
        outcome.endings["named"] += 1


def without_float32(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """The process that computes the whole model in float32 killed: the server is not called compared with it."""
    with Life(place, outcome) as life:
        wait_until(lambda: bool(life.command.parts(FLOAT32)), 60, "the float32 process")
        time.sleep(rng.uniform(0, 3))
        killed = life.kill(FLOAT32)
        life.wait_ready()
        if killed and "not compared" not in life.command.out and "not checked" not in life.command.out:
            raise Wrong(f"nothing was compared, and nobody says so: {life.command.out}")
        life.end(signal.SIGINT)


def many_deaths(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """A server that had been ready dies again and again, in any phase of coming up too."""
    with Life(place, outcome) as life:
        life.wait_ready()
        for turn in range(4):
            who = rng.choice(tuple(PARTS))
            if turn and rng.random() < 0.6:
                life.wait_phase(rng.choice(PHASES))
                time.sleep(rng.uniform(0, 0.5))
            else:
                life.wait_ready()
            if not life.kill(who):
                life.kill("main")
            life.expect_restart()
        life.wait_ready()
        life.end(rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))


def hang(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """A process stands still: unresponsive, then restarted."""
    with Life(place, outcome, "server.hang_timeout_s=8") as life:
        life.wait_ready()
        process = life.part(rng.choice(("main", "scheduler")))
        assert process is not None
        kill(process, signal.SIGSTOP)
        wait_until(lambda: life.state["state"] in ("unresponsive", "restarting"), 30, "the state unresponsive")
        life.expect_restart()
        life.wait_ready()
        life.end(signal.SIGINT)


def hostile(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """Requests and adapters that nobody should send, and a disk that is full meanwhile: the same process goes on."""
    with Life(place, outcome) as life:
        life.wait_ready()
        before = {name: life.part(name) for name in PARTS}
        main = before["main"]
        assert main is not None
        with httpx.Client(base_url=life.url, timeout=60, trust_env=False) as client:
            for request in rng.sample(requests(), len(requests())):
                answer = request.send(client)
                if answer is None or answer == NO_ANSWER:
                    outcome.wrong.append(f"no answer to {str(request)[:300]}")
                outcome.endings[_kind(answer or NO_ANSWER)] += 1
                if not works(main):
                    raise Wrong(f"the server ended at {str(request)[:300]}: {life.command.err[-400:]}")
            for name, folder in adapters(life.allowed, shipped_adapter(), rng):
                loaded = client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
                if loaded.status_code >= 500:
                    outcome.wrong.append(f"the adapter {name}: {loaded.status_code} {loaded.text[:300]}")
                outcome.endings["refused" if loaded.status_code >= 400 else "right"] += 1
                if loaded.status_code == 200:
                    client.post("/unload_lora_adapter", json={"lora_name": name})
        with _no_room(life):
            for _ in range(3):
                if life.ask() != life.expected:
                    raise Wrong("other answers on a full disk")
        life.wait_ready()
        if {name: life.part(name) for name in PARTS} != before:
            raise Wrong(f"not the same processes any more: {life.state['attempts']}")
        life.end(signal.SIGTERM)


def race_for_port(place: Place, _: object, rng: Random, outcome: Outcome) -> None:
    """Two launches on one port: one is proven, the other told; and the one that is proven is the one that answers."""
    port = rng.randrange(42000, 48000)
    with Life(place, outcome, f"server.port={port}") as one:
        time.sleep(rng.choice((0.0, rng.uniform(0, 8))))
        with Life(place, outcome, f"server.port={port}") as other:
            wait_until(lambda: any(_ended(each) for each in (one, other)), READY_S, "one of two that gives way")
            winner, loser = (other, one) if _ended(one) else (one, other)
            code = loser.command.wait(END_S)
            if code not in (2, 3) or len(loser.command.errors) != 1 or "ready:" in loser.command.out:
                raise Wrong(f"two on one port: exit code {code}, {loser.command.err[-300:]} {loser.command.out}")
            winner.wait_ready()
            winner.end(signal.SIGINT)


def _kind(status: int) -> str:
    return (
        "right" if status < 400 else "refused" if status < 500 or status == 501 else "answered with an error of its own"
    )


def _ended(life: Life) -> bool:
    return life.command.process.poll() is not None


def shipped_adapter() -> Path:
    """The demo's own."""
    import kt_launch

    assert kt_launch.__file__
    return Path(kt_launch.__file__).parent / "demo" / "west"


@contextlib.contextmanager
def _no_room(life: Life) -> Iterator[None]:
    """No process of it may write a byte to a file."""
    pids = [life.command.process.pid, *(each.pid for name in PARTS if (each := life.part(name)))]
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def clear(place: Place) -> None:
    """A launcher that was killed leaves its folder for temporary files to the next start, which removes it."""
    before, tempfile.tempdir = tempfile.tempdir, str(place.temporary)
    try:
        remove_abandoned()
    finally:
        tempfile.tempdir = before
    for folder in place.runs.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
