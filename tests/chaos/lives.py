"""One launch of the demo with its adapter: what it answered when it was first ready, what it is at, how it is
disturbed, and what has to follow.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
from outcomes import Outcome
from place import Command, Place, Wrong, kill, wait_until

from kt_launch.watching.client import ALONE

READY_S, RESTART_S, END_S = 300.0, 180.0, 90.0
RESTARTS = 6
PARTS = {"main": "kt_sglang.server", "scheduler": "sglang::scheduler", "detokenizer": "sglang::detokenizer"}
FLOAT32 = "kt_launch.proving.float32_run"
PHASES = ("start", "import SGLang", "processes", "model code", "weights", "adapters", "memory", "warm-up", "proof")
PHASE = re.compile(rf"^ +[\d.]+ s  ({'|'.join(PHASES)})", re.M)
PROMPTS = ("The lighthouse keeper", "Answer: ", "1 2 3 4")
QUESTIONS = tuple(f"What is the capital of {country}?" for country in ("France", "Italy", "Spain", "Egypt"))
"""The demo has learnt them: no answer hangs on the last bit of a sum, which depends on what else is in the batch."""
MODELS = ("demo", "demo:west")
UNPROVEN = "proof.whole_model=off"
"""Where a quick start is worth more; answers are compared with those that the same launch gave before."""


class Life:
    """From `with` to its end, which it has at the block's end at the latest."""

    def __init__(self, place: Place, outcome: Outcome, *words: str, **environment: str) -> None:
        self.place, self.outcome = place, outcome
        self.allowed = place.folder()
        own = ("server.device=cpu", f"lora.allow=[{self.allowed}]", f"server.restarts={RESTARTS}", *words)
        self.command: Command = place.spawn(*own, **environment)
        self.expected: list[Any] = []
        self.learnt: dict[tuple[str, str], str] = {}
        self._told = 0
        self._starts = 1

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        if self.command.process.poll() is None:
            self.command.signal(signal.SIGKILL)
            self.command.process.wait()

    @property
    def folder(self) -> Path | None:
        """Of the run, once it is told."""
        found = re.search(r"^run: (.*)$", self.command.out, re.M)
        return Path(found[1]) if found else None

    @property
    def state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((self.folder or Path("/none") / "none").joinpath("state.json").read_text())
            return content if isinstance(content, dict) else {}
        return {}

    @property
    def url(self) -> str:
        return str(self.state["url"])

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False, limits=ALONE)

    def wait_ready(self) -> None:
        """Ready, at the start that it is at by now, with the first answers."""

        def ready() -> bool:
            self._require_alive()
            return len(self.state.get("attempts", [])) >= self._starts and self.state["state"] == "ready"

        wait_until(ready, READY_S, f"ready: {self.command.err[-300:]}")
        with self.client() as client:
            answers = ask(client)
            learnt = {(model, each): ask_learnt(client, model, each) for model in MODELS for each in QUESTIONS}
        self.expected, self.learnt = self.expected or answers, self.learnt or learnt
        if (answers, learnt) != (self.expected, self.learnt):
            raise Wrong(f"other answers: {answers} {learnt}, expected {self.expected} {self.learnt}")

    def ask(self) -> list[Any]:
        with self.client() as client:
            return ask(client)

    def wait_phase(self, phase: str) -> None:
        """The start that it is at by now has come so far."""

        def there() -> bool:
            self._require_alive()
            return phase in PHASE.findall(self.command.err[self._told :])

        wait_until(there, READY_S, f"the phase {phase}")

    def part(self, name: str) -> psutil.Process | None:
        found = self.command.parts(PARTS.get(name, name))
        return found[0] if found else None

    def wait_part(self, name: str) -> None:
        """Until it is there, or the launch is over."""
        wait_until(lambda: self.part(name) is not None or self.ended, READY_S, f"the process {name}")

    def kill(self, name: str, phase: str) -> bool:
        """Whether there was such a process to kill."""
        process = self.part(name)
        if process is None:
            return False
        kill(process)
        self.outcome.killed[name.rpartition(".")[2], phase] += 1
        return True

    def expect_restart(self) -> None:
        """The cause is told, and another start follows."""
        begun = self._starts
        self._starts += 1

        def again() -> bool:
            self._require_alive()
            return len(self.state.get("attempts", [])) > begun

        wait_until(again, RESTART_S, f"a restart: {self.command.err[-300:]}")
        self._told = self.command.err.rfind("starting the server again")
        attempt = self.state["attempts"][begun - 1]
        if not attempt["ending"] or not attempt["cause"]:
            raise Wrong(f"a death without a name: {attempt}")
        self.outcome.endings["restarted"] += 1

    def end(self, number: int, phase: str = "ready") -> None:
        """The launcher, by a signal; a killed one is told as lost, and takes its server with it."""
        began = self.folder is not None
        self.command.signal(number)
        code = self.command.wait(END_S)
        if number == signal.SIGKILL:
            self.expect_lost(code, phase, began)
        elif code != 130:
            raise Wrong(f"signal {number}: exit code {code}: {self.command.err[-300:]}")
        else:
            self.outcome.killed["launcher", phase] += phase != "ready"
            self.outcome.endings["ended in order"] += 1

    def expect_lost(self, code: int, phase: str, began: bool = True) -> None:
        """Of a launcher that was killed; began: whether it had told of its run."""
        if code != -signal.SIGKILL:
            raise Wrong(f"killed: exit code {code}: {self.command.err[-300:]}")
        self.outcome.killed["launcher", phase] += 1
        done = self.place.finish("action=status", "--json")
        if began and json.loads(done.out or "{}").get("state") != "lost":
            raise Wrong(f"a killed launcher is not told as lost: {done.out} {done.err}")
        self.outcome.endings["named"] += 1

    @property
    def ended(self) -> bool:
        return self.command.process.poll() is not None

    def _require_alive(self) -> None:
        if self.ended:
            raise Wrong(f"the launcher ended with {self.command.process.returncode}: {self.command.err[-400:]}")


class Load:
    """Clients that ask all the time, from `with` to its end: each answer is the right one, or there is none."""

    CLIENTS = 3

    def __init__(self, life: Life) -> None:
        self._life, self._over = life, threading.Event()
        self._workers = [threading.Thread(target=self._work, args=(number,)) for number in range(self.CLIENTS)]
        self.right = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Load:
        for worker in self._workers:
            worker.start()
        wait_until(lambda: self.right >= self.CLIENTS or bool(self.wrong), 120, "answers under load")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for worker in self._workers:
            worker.join()
        self._life.outcome.endings["right"] += self.right
        self._life.outcome.wrong += self.wrong[:3]

    def _work(self, number: int) -> None:
        with self._life.client() as client:
            for model, question in self._life.learnt:
                if self._over.is_set():
                    return
                self._ask(client, model, question)
            self._work(number)

    def _ask(self, client: httpx.Client, model: str, question: str) -> None:
        try:
            answer = ask_learnt(client, model, question)
        except (httpx.HTTPError, KeyError, ValueError):
            self._over.wait(0.2)
            return
        if answer == self._life.learnt[model, question]:
            self.right += 1
        else:
            self.wrong.append(f"under load, {model}, {question}: {answer!r}")


def ask(client: httpx.Client) -> list[Any]:
    """Greedy answers of base and adapter, with logprobs."""
    found = []
    for model in MODELS:
        for prompt in PROMPTS:
            body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
            choice = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
            found.append((choice["text"], choice["logprobs"]["token_logprobs"]))
    return found


def ask_learnt(client: httpx.Client, model: str, question: str) -> str:
    """What a chat answers to one of QUESTIONS."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])
