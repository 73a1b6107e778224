"""Servers of the demo model: processes of theirs killed in every phase, stopped, or fed with what nobody should send;
what answers afterwards answers as at the beginning. Not here: servers that something else starts (callers.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import psutil
from dying import RENAMING, WRITING, dying_at
from hostile import NO_ANSWER, adapters, requests, sound_copy
from lives import END_S, FLOAT32, PARTS, PHASES, READY_S, UNPROVEN, Life, Load
from outcomes import Outcome
from place import Place, Wrong, kill, wait_until

from kt_launch.machine.processes import works
from kt_launch.runs.scratch import remove_abandoned
from kt_launch.watching.client import ALONE

SOON = 3
"""The phase, of PHASES, from which on there are more processes than the main one."""
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _hyphened(phase: str) -> str:
    return phase.replace(" ", "-")


STARTS = tuple(
    f"{who}-{_hyphened(phase)}"
    for who, phases in (
        ("launcher", PHASES), ("main", PHASES), ("scheduler", PHASES[SOON:]), ("detokenizer", PHASES[SOON:])
    )
    for phase in phases
)  # fmt: skip


def first_start(place: Place, _: object, rng: Random, outcome: Outcome, variant: str) -> None:
    """A process killed while the server comes up for the first time: exit code 3 and the cause in one line."""
    who, _, hyphened = variant.partition("-")
    phase = next(each for each in PHASES if _hyphened(each) == hyphened)
    with Life(place, outcome, *(() if phase == PHASES[-1] else (UNPROVEN,))) as life:
        life.wait_phase(phase)
        time.sleep(rng.uniform(0, 0.5))
        if who == "launcher":
            life.end(rng.choice(ENDS), phase)
            return
        life.wait_part(who)
        if not life.kill(who, phase):
            raise Wrong(f"no process {who} at {phase}: {life.command.err[-400:]}")
        code = life.command.wait(END_S)
        if code != 3 or len(life.command.errors) != 1:
            raise Wrong(f"{who} killed at {phase}: exit code {code}, {life.command.err[-400:]}")
        outcome.endings["named"] += 1


def without_float32(place: Place, _: object, rng: Random, outcome: Outcome, __: str) -> None:
    """The process that computes the whole model in float32 killed: the server is not called compared with it."""
    with Life(place, outcome) as life:
        life.wait_part(FLOAT32)
        time.sleep(rng.uniform(0, 3))
        killed = life.kill(FLOAT32, "computing")
        life.wait_ready()
        if killed and "not compared" not in life.command.out and "not checked" not in life.command.out:
            raise Wrong(f"nothing was compared, and nobody says so: {life.command.out}")
        outcome.endings["named"] += killed
        life.end(signal.SIGINT)


SUPERVISED = {
    "main-working": ("main", ("ready", "load"), ("launcher", "load")),
    "main-changing": ("main", ("adapter", "restart"), ("main", "stopping")),
    "scheduler-working": ("scheduler", ("ready", "load"), ("launcher", "ready")),
    "scheduler-changing": ("scheduler", ("adapter", "restart"), ("scheduler", "stopping")),
    "detokenizer-working": ("detokenizer", ("ready", "load"), ("launcher", "restart")),
    "detokenizer-twice": ("detokenizer", ("ready", "restart"), ("launcher", "stopping")),
    "detokenizer-changing": ("detokenizer", ("adapter", "restart"), ("detokenizer", "stopping")),
}
"""Name -> which process dies, when, one after another, and who is killed when in the end."""


def supervised(place: Place, _: object, rng: Random, outcome: Outcome, variant: str) -> None:
    """A server that had been ready dies again and again, and is started again each time."""
    who, phases, (last, ending) = SUPERVISED[variant]
    with Life(place, outcome, UNPROVEN) as life:
        for phase in phases:
            _die(life, who, phase, rng)
        life.wait_ready()
        _end(life, last, ending, rng)


def packing(place: Place, _: object, rng: Random, outcome: Outcome, kind: str) -> None:
    """The scheduler dies while it keeps its experts in an empty cache: the next start serves right, and keeps them."""
    cache = place.folder()
    dying = dying_at(kind, rng.randint(1, 6), cache / "packed", place.folder() / "armed")
    with Life(place, outcome, UNPROVEN, KT_LAUNCH_CACHE=str(cache), **dying) as life:
        wait_until(lambda: life.ended or len(life.state.get("attempts", [])) > 1, READY_S, "a death while packing")
        outcome.killed["scheduler", f"packing: {kind}"] += 1
        if not life.ended:
            life.expect_restart()
            life.wait_ready()
            life.end(signal.SIGINT)
        elif life.command.process.returncode != 3 or len(life.command.errors) != 1:
            raise Wrong(f"died while packing: {life.command.process.returncode}, {life.command.err[-400:]}")
        else:
            outcome.endings["named"] += 1
    with Life(place, outcome, UNPROVEN, KT_LAUNCH_CACHE=str(cache)) as life:
        life.wait_ready()
        _require_whole_cache(place, str(cache))
        life.end(signal.SIGTERM)


def _die(life: Life, who: str, phase: str, rng: Random) -> None:
    life.wait_ready()
    if phase == "load":
        with Load(life):
            time.sleep(rng.uniform(0, 2))
            _require_killed(life, who, "load")
            life.expect_restart()
        return
    if phase == "adapter":
        with _loading(life):
            time.sleep(rng.uniform(0, 0.4))
            _require_killed(life, who, "adapter loading")
        life.expect_restart()
        return
    _require_killed(life, who, "ready")
    life.expect_restart()
    if phase == "restart":
        coming = rng.choice(PHASES[SOON:])
        life.wait_phase(coming)
        life.wait_part(who)
        time.sleep(rng.uniform(0, 0.5))
        _require_killed(life, who, f"restart: {coming}")
        life.expect_restart()


def _require_killed(life: Life, who: str, phase: str) -> None:
    if not life.kill(who, phase):
        raise Wrong(f"no process {who} at {phase}: {life.command.err[-300:]}")


@contextlib.contextmanager
def _loading(life: Life) -> Iterator[None]:
    """Adapters are loaded and unloaded meanwhile, by somebody who minds no error."""
    folder, url, over = sound_copy(life.allowed, shipped_adapter()), life.url, threading.Event()

    def load() -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=ALONE) as client:
            for turn in itertools.count():
                if over.is_set():
                    return
                with contextlib.suppress(httpx.HTTPError):
                    client.post("/load_lora_adapter", json={"lora_name": f"come{turn}", "lora_path": str(folder)})
                    client.post("/unload_lora_adapter", json={"lora_name": f"come{turn}"})

    worker = threading.Thread(target=load)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()


def _require_whole_cache(place: Place, cache: str) -> None:
    """What is packed is packed whole, sooner or later."""

    def whole() -> bool:
        done = place.finish("action=cache", "cache.do=verify", "format=json", KT_LAUNCH_CACHE=cache)
        if done.process.returncode:
            raise Wrong(f"the packed cache after kills: {done.out} {done.err}")
        states = [item["state"] for item in json.loads(done.out)]
        return {*states} == {"whole"}

    wait_until(whole, 120, "a whole packed cache")


def _end(life: Life, who: str, phase: str, rng: Random) -> None:
    if who != "launcher":
        life.command.signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.3))
        life.kill(who, phase)
        life.end(signal.SIGTERM)
    elif phase == "load":
        with Load(life):
            life.end(signal.SIGKILL, phase)
    elif phase == "restart":
        life.kill("main", "ready")
        life.expect_restart()
        time.sleep(rng.uniform(0, 3))
        life.end(signal.SIGKILL, phase)
    elif phase == "stopping":
        life.command.signal(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.5))
        life.end(signal.SIGKILL, phase) if not life.ended else life.end(signal.SIGTERM)
    else:
        life.end(signal.SIGKILL, phase)


def hang(place: Place, _: object, rng: Random, outcome: Outcome, who: str) -> None:
    """A process stands still: unresponsive, then restarted."""
    with Life(place, outcome, "server.hang_timeout_s=20", UNPROVEN) as life:
        life.wait_ready()
        process = life.part(who)
        assert process is not None
        kill(process, signal.SIGSTOP)
        wait_until(lambda: life.state["state"] in ("unresponsive", "restarting"), 60, "the state unresponsive")
        life.expect_restart()
        outcome.killed[who, "standing still"] += 1
        life.wait_ready()
        life.end(rng.choice(ENDS[1:]))


def hostile(place: Place, _: object, rng: Random, outcome: Outcome, __: str) -> None:
    """Requests and adapters that nobody should send, and a disk that is full meanwhile: the same process goes on."""
    with Life(place, outcome) as life:
        life.wait_ready()
        before = {name: life.part(name) for name in PARTS}
        main = before["main"]
        assert main is not None
        with life.client() as client:
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


def race_for_port(place: Place, _: object, rng: Random, outcome: Outcome, __: str) -> None:
    """Two launches on one port: one is proven, the other told; and the one that is proven is the one that answers."""
    port = rng.randrange(42000, 48000)
    with Life(place, outcome, f"server.port={port}") as one:
        time.sleep(rng.choice((0.0, rng.uniform(0, 8))))
        with Life(place, outcome, f"server.port={port}") as other:
            wait_until(lambda: one.ended or other.ended, READY_S, "one of two that gives way")
            winner, loser = (other, one) if one.ended else (one, other)
            code = loser.command.wait(END_S)
            if code not in (2, 3) or len(loser.command.errors) != 1 or "ready:" in loser.command.out:
                raise Wrong(f"two on one port: exit code {code}, {loser.command.err[-300:]} {loser.command.out}")
            winner.wait_ready()
            winner.end(signal.SIGINT)


def _kind(status: int) -> str:
    return (
        "right" if status < 400 else "refused" if status < 500 or status == 501 else "answered with an error of its own"
    )


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
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def remove_abandoned_in(place: Place) -> None:
    """A launcher that was killed leaves its folder for temporary files to the next start, which removes it."""
    before, tempfile.tempdir = tempfile.tempdir, str(place.temporary)
    try:
        remove_abandoned()
    finally:
        tempfile.tempdir = before


ATTEMPTS = {
    "start": (first_start, STARTS),
    "float32": (without_float32, ("",)),
    "packing": (packing, (WRITING, RENAMING)),
    "supervised": (supervised, tuple(SUPERVISED)),
    "hang": (hang, tuple(PARTS)),
    "hostile": (hostile, ("",)),
    "port": (race_for_port, ("",)),
}
