"""What starts servers for itself: a bench, a sweep of benches, a chat, a launch that is left alone, replicas behind a
router. Its own process dies, or one that it started: then it says so, and nothing of it is left.
"""

from __future__ import annotations

import json
import re
import signal
import time
from random import Random

import httpx
from commands import Material
from lives import QUESTIONS, READY_S, RESTART_S, UNPROVEN, Life, ask_learnt
from outcomes import Outcome
from place import Command, Place, Wrong, kill, wait_until

SERVER, MEASURE, APART = "kt_sglang.server", "kt_launch.bench.measure", "kt_launch.running.child_launcher"
CLIENT, LAUNCHER = "kt_sglang.bench_client", "kt_launch.running.launch"
ROUTER = "kt_launch.cluster.router"
SCHEDULER = "sglang::scheduler"
LOAD = (
    "bench.requests=48",
    "bench.output_tokens=48",
    "bench.input_tokens=64",
    "bench.concurrency=[4]",
    "bench.warmup=1",
)
QUICK = (UNPROVEN, "bench.quality=false")
DEVICE = "server.device=cpu"
ADMIN_KEY = "of-the-router"
ITSELF = "itself"

BENCHES = {
    "bench-start": (ITSELF, SERVER),
    "bench-load": (ITSELF, CLIENT),
    "measuring-start": (MEASURE, SERVER),
    "measuring-load": (MEASURE, CLIENT),
    "client-load": (CLIENT, CLIENT),
    "launcher-load": (APART, CLIENT),
    "server-load": (SERVER, CLIENT),
    "scheduler-load": (SCHEDULER, CLIENT),
}
"""Name -> who dies, some time after which process is there."""


def bench(place: Place, __: Material, rng: Random, outcome: Outcome, variant: str) -> None:
    """One process of a bench dies: the bench says why it ended, or has ended itself."""
    victim, sign = BENCHES[variant]
    command = place.spawn("action=bench", DEVICE, *LOAD, *QUICK)
    _wait_for(command, sign)
    time.sleep(rng.uniform(0, 6))
    who, _, phase = variant.partition("-")
    _kill_and_name(command, who if victim == ITSELF else f"bench: {who}", phase, victim, outcome)


def sweep(place: Place, _: Material, rng: Random, outcome: Outcome, __: str) -> None:
    """Of a sweep of two benches the first job dies, and the sweep in the second: run again, it goes on with that."""
    words = ("-m", "action=bench", DEVICE, *LOAD[1:], *QUICK, "bench.requests=4,5", f"sweep.folder={place.folder()}")
    command = place.spawn(*words)
    _kill_part(command, MEASURE, SERVER, rng)
    outcome.killed["sweep: job", "start"] += 1
    wait_until(lambda: "job 1" in command.err, RESTART_S, "the second job")
    _wait_for(command, SERVER)
    command.kill("sweep: itself", "second job", outcome)
    again = place.finish(*words)
    rows = re.findall(r"^.*(?:killed by SIGKILL|row exists already).*$", again.out + again.err, re.M)
    if again.process.returncode != 128 + signal.SIGKILL or not rows:
        raise Wrong(f"the sweep does not go on: {again.process.returncode} {again.err[-400:]}")
    outcome.endings["resumed"] += 1


def chat(place: Place, __: Material, rng: Random, outcome: Outcome, variant: str) -> None:
    """A chat that started its own server, or what it started, dies while the server comes up or between two answers."""
    who, _, phase = variant.partition("-")
    command = place.spawn("action=chat", "model=demo", "lora=demo_west", DEVICE, UNPROVEN)
    _wait_for(command, SERVER)
    if phase == "answer":
        command.type(QUESTIONS[0])
        wait_until(lambda: "Paris" in command.out or _ended(command), READY_S, f"an answer: {command.err[-300:]}")
        for question in QUESTIONS:
            command.type(question)
    time.sleep(rng.uniform(0, 1 if phase == "answer" else 6))
    victim = {"chat": ITSELF, "launcher": APART, "server": SERVER}[who]
    name = who if who == "chat" else f"chat: {who}"
    if phase == "answer" and who != "chat":
        _kill_first(command, victim)
        outcome.killed[name, phase] += 1
        time.sleep(rng.uniform(0, 3))
        command.type(QUESTIONS[1])
        _expect_named(command, outcome)
        return
    _kill_and_name(command, name, phase, victim, outcome)


def detached(place: Place, _: Material, rng: Random, outcome: Outcome, variant: str) -> None:
    """A launch that is left alone: whoever started it, itself, or whoever stops it dies."""
    command = place.spawn("detach=true", DEVICE, UNPROVEN)
    _wait_for(command, SERVER)
    if variant == "launcher-start":
        time.sleep(rng.uniform(0, 6))
        _kill_and_name(command, "detached launcher", "start", LAUNCHER, outcome)
        return
    if variant == "starter-start":
        time.sleep(rng.uniform(0, 3))
        command.kill("detached: starter", "start", outcome)
    wait_until(lambda: _status(place) == "ready", READY_S, f"a detached launch: {command.err[-300:]}")
    if variant == "stopper-stopping":
        stopper = place.spawn("action=stop")
        time.sleep(rng.uniform(0.3, 2))
        stopper.kill("detached: stopper", "stopping", outcome)
    done = place.finish("action=stop", "run=latest")
    if done.process.returncode or _status(place) != "ended":
        raise Wrong(f"a detached launch does not stop: {_status(place)} {done.out} {done.err}")
    outcome.endings["ended in order"] += 1


def replicas(place: Place, _: Material, rng: Random, outcome: Outcome, last: str) -> None:
    """Two servers behind a router: one is started again, one loses its launcher, then the router or all of it goes."""
    words = ("server.replicas=2", "server.admin_key=env:KT_LAUNCH_ADMIN_KEY", UNPROVEN)
    with Life(place, outcome, *words, KT_LAUNCH_ADMIN_KEY=ADMIN_KEY) as life:
        life.wait_ready()
        kill(rng.choice(life.command.parts(SERVER)))
        outcome.killed["replica: server", "ready"] += 1
        wait_until(lambda: _healthy(life) == 1, 60, "one replica less")
        _require_right(life)
        wait_until(lambda: _healthy(life) == 2, RESTART_S, f"the replica again: {life.command.err[-300:]}")
        outcome.endings["restarted"] += 1
        kill(rng.choice(life.command.parts(LAUNCHER)))
        outcome.killed["replica: launcher", "ready"] += 1
        wait_until(lambda: "ended (killed by SIGKILL)" in life.command.err, 60, "the lost replica's death, told")
        wait_until(lambda: _healthy(life) == 1, 60, "one replica less")
        _require_right(life)
        outcome.endings["named"] += 1
        if last == "launcher":
            life.end(signal.SIGKILL, "replicas")
            return
        _kill_and_name(life.command, "router", "ready", ROUTER, outcome)


def route(place: Place, _: Material, rng: Random, outcome: Outcome, __: str) -> None:
    """A router before a server that runs already: it dies, then whoever started it; the server goes on."""
    with Life(place, outcome, UNPROVEN) as life:
        life.wait_ready()
        for name, phase, victim in (
            ("route: router", "start", ROUTER),
            ("route: router", "ready", ROUTER),
            ("route", "start", ITSELF),
            ("route", "ready", ITSELF),
        ):
            command = place.spawn("action=route", f"workers=[{life.url}]")
            _wait_for(command, ROUTER)
            if phase == "ready":
                _wait_ready(command)
            time.sleep(rng.uniform(0, 0.5) if phase == "start" else rng.uniform(0, 2))
            _kill_and_name(command, name, phase, victim, outcome)
        life.wait_ready()
        life.end(signal.SIGINT)


def _wait_for(command: Command, part: str) -> None:
    wait_until(lambda: bool(command.parts(part)) or _ended(command), READY_S, f"the process {part}")
    if _ended(command):
        raise Wrong(f"ended before {part}: {command.process.returncode} {command.err[-400:]}")


def _wait_ready(command: Command) -> None:
    wait_until(lambda: "ready: " in command.out or _ended(command), READY_S, "its line, ready")


def _kill_part(command: Command, victim: str, sign: str, rng: Random) -> None:
    _wait_for(command, sign)
    time.sleep(rng.uniform(0, 3))
    _kill_first(command, victim)


def _kill_first(command: Command, victim: str) -> None:
    found = command.parts(victim)
    if not found:
        raise Wrong(f"no process {victim}: {command.err[-400:]}")
    kill(found[0])


def _kill_and_name(command: Command, name: str, phase: str, victim: str, outcome: Outcome) -> None:
    """A command that dies says nothing more; of another the command says that it is gone, in a line."""
    if victim == ITSELF:
        command.kill(name, phase, outcome)
        outcome.endings["ended with its caller"] += 1
        return
    _kill_first(command, victim)
    outcome.killed[name, phase] += 1
    _expect_named(command, outcome)


def _expect_named(command: Command, outcome: Outcome) -> None:
    code = command.wait(RESTART_S)
    told = [*command.errors, *re.findall(r"^kt-launch: .*ended unexpectedly.*$", command.err, re.M)]
    if code <= 0 or not told:
        raise Wrong(f"a death without a name: exit code {code}, {command.err[-400:]}")
    outcome.endings["named"] += 1


def _ended(command: Command) -> bool:
    return command.process.poll() is not None


def _status(place: Place) -> str:
    done = place.finish("action=status", "run=latest", "--json")
    return str(json.loads(done.out).get("state")) if done.out.strip() else done.err


def _healthy(life: Life) -> int:
    with life.client(10) as client:
        answer = client.get("/workers", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        return sum(bool(worker["is_healthy"]) for worker in answer.raise_for_status().json()["workers"])


def _require_right(life: Life) -> None:
    """What answers, answers right; a request that was on its way to the dead one may fail."""
    right = 0
    with life.client() as client:
        for (model, question), answer in life.learnt.items():
            try:
                said = ask_learnt(client, model, question)
            except httpx.HTTPError:
                continue
            if said != answer:
                raise Wrong(f"a replica: {model}, {question}: {said!r}, expected {answer!r}")
            right += 1
    if not right:
        raise Wrong("no replica answers")
    life.outcome.endings["right"] += right


ATTEMPTS = {
    "bench": (bench, tuple(BENCHES)),
    "sweep-of-benches": (sweep, ("",)),
    "chat": (chat, ("chat-start", "chat-answer", "launcher-start", "launcher-answer", "server-answer")),
    "detached": (detached, ("launcher-start", "starter-start", "stopper-stopping")),
    "replicas": (replicas, ("router", "launcher")),
    "route": (route, ("",)),
}
