"""Commands that end by themselves, killed at any moment: run again, they make what an undisturbed one makes, and leave
nothing else. Not here: several at once, full disks and damage (contested.py).
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from dying import IMPORTS, READING, RENAMING, WRITING, any_of, counted, counting, dying_at
from hub_stand_in import COMMIT, running_hub
from outcomes import Outcome
from place import Command, Place, Wrong, digests

ANY = "any-moment"
"""By a signal from outside, after a time by chance."""
READS, WRITES = (IMPORTS, READING, ANY), (IMPORTS, READING, WRITING, RENAMING, ANY)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT, 128 + signal.SIGTERM)
REPOSITORY = "lab/tiny"
PLANNED = ("server.device=cpu",)


class Material:
    """Checkpoints, an adapter, and what undisturbed commands make of them; each runs when it is first needed."""

    def __init__(self, place: Place) -> None:
        import tiny_files  # needs torch, which no mistake of a command line should wait for
        import weight_files

        self.place = place
        folder = place.keep(place.folder())
        self.folder = folder
        self.checkpoint = weight_files.write_checkpoint(
            folder / "m", shards=3, num_hidden_layers=16, moe_intermediate_size=256, hidden_size=256
        )
        self.larger_adapter = weight_files.write_adapter(folder / "larger", self.checkpoint)
        tiny_files.write_checkpoint(folder / "tiny")
        self.tiny = folder / "tiny"
        self.adapter = tiny_files.write_adapter(folder / "west")
        self._undisturbed: dict[str, Undisturbed] = {}

    def undisturbed(self, name: str) -> Undisturbed:
        if name not in self._undisturbed:
            self._undisturbed[name] = self._run(name)
        return self._undisturbed[name]

    def _run(self, name: str) -> Undisturbed:
        """Twice: the first run may compile or remember what later ones find."""
        work = WORKS[name]
        for turn in range(2):
            place = self.place.folder()
            log = self.place.keep(self.place.folder()) / f"moments-{turn}"
            with work.around(self, place) as environment:
                words, began = work.words(self, place), time.monotonic()
                environment = environment | (counting(log, self.place.root) if turn else {})
                done = self.place.finish(*words, **environment)
                if done.process.returncode:
                    raise Wrong(f"{name} does not work at all: {done.err}")
        return Undisturbed(time.monotonic() - began, counted(log), work.found(place, done))


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed: how long it took, its moments by kind, and what it made."""

    whole_s: float
    moments: Counter[str]
    made: Any


class Around:
    """What a command needs beside its words: nothing."""

    def __init__(self, material: Material, place: Path) -> None:
        self.material, self.place = material, place

    def __enter__(self) -> dict[str, str]:
        return {}

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


class WithHub(Around):
    """A Hub that has the tiny checkpoint, and an empty cache of it."""

    def __enter__(self) -> dict[str, str]:
        self._hub = running_hub()
        hub = self._hub.__enter__()
        hub.repositories[REPOSITORY] = self.material.tiny
        return {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.place / "hub"), "HF_HUB_DISABLE_XET": "1"}

    def __exit__(self, *_: object) -> None:
        self._hub.__exit__(None, None, None)


class WithCache(Around):
    """A cache of its own, in which somebody has left half of an entry."""

    def __enter__(self) -> dict[str, str]:
        cache = self.place / "cache"
        for name in ("one", "two", "three"):
            half = cache / "packed" / f"{name}.partial"
            half.mkdir(parents=True, exist_ok=True)
            (half / "layer-00001.safetensors").write_bytes(bytes(4096))
        return {"KT_LAUNCH_CACHE": str(cache)}


@dataclass(frozen=True)
class Work:
    """A command. words: of its line, for a place. found: what there is of it in the end, to be the same each time."""

    words: Callable[[Material, Path], list[str]]
    found: Callable[[Path, Command], Any]
    phases: tuple[str, ...] = WRITES
    around: type[Around] = Around


def _made(place: Path, _: Command) -> Any:
    """Every byte, and nothing beside it but the lock."""
    return digests(place / "made"), sorted(path.name for path in place.iterdir())


def _exported(place: Path, _: Command) -> Any:
    return {path.name: path.read_text().replace(str(place), "") for path in place.iterdir()}


def _swept(place: Path, _: Command) -> Any:
    folder = place / "sweep"
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("rows/*.json"))]
    return json.loads((folder / "sweep.json").read_text())["done"], [(row["state"], row["overrides"]) for row in rows]


def _downloaded(place: Path, _: Command) -> Any:
    repository = place / "hub" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    return digests(repository / "snapshots" / COMMIT), [path.name for path in repository.rglob("*.incomplete")]


def _pruned(place: Path, _: Command) -> Any:
    return sorted(path.name for path in (place / "cache" / "packed").iterdir() if path.name.endswith(".partial"))


def _said(_: Path, done: Command) -> Any:
    return done.out


def _nothing(_: Path, __: Command) -> Any:
    return None


def _reader(action: str, *words: str, said: bool = True) -> Work:
    def line(material: Material, _: Path) -> list[str]:
        return [f"action={action}", f"model={material.tiny}", f"lora={material.adapter}", *words]

    return Work(line, _said if said else _nothing, READS)


WORKS: dict[str, Work] = {
    "quantize": Work(
        lambda m, place: ["action=quantize", f"model={m.checkpoint}", "kt=int8", f"kt.weight_path={place / 'made'}"],
        _made,
    ),
    "merge": Work(
        lambda m, place: [
            "action=merge", f"model={m.checkpoint}", f"lora={m.larger_adapter}", f"merge.path={place / 'made'}"
        ],
        _made,
    ),
    "sweep": Work(
        lambda m, place: [
            "-m", "action=plan", f"model={m.tiny}", *PLANNED, f"sweep.folder={place / 'sweep'}",
            "server.context_length=64,128",
        ],
        _swept,
    ),
    "export": Work(
        lambda m, place: [
            "action=export", f"model={m.tiny}", *PLANNED, "export.format=compose", f"export.path={place / 'unit'}"
        ],
        _exported,
    ),
    "download": Work(
        lambda _, __: ["action=plan", f"model={REPOSITORY}", "hub.download=true", *PLANNED],
        _downloaded,
        around=WithHub,
    ),
    "prune": Work(
        lambda _, __: ["action=cache", "cache.do=prune"], _pruned, (IMPORTS, READING, WRITING, ANY), WithCache
    ),
    "plan": _reader("plan", *PLANNED, said=False),
    "inspect": _reader("inspect"),
    "config": _reader("config"),
    "explain": _reader("explain", "key=kt.method", *PLANNED),
    "fit": _reader("fit", said=False),
    "schema": _reader("schema"),
    "runs": _reader("runs"),
}  # fmt: skip
"""By the name of the process that dies."""


def kill(process: str, place: Place, material: Material, rng: Random, outcome: Outcome, phase: str) -> None:
    """Once at the phase, then up to three times more, then run to its end."""
    work, undisturbed, target = WORKS[process], material.undisturbed(process), place.folder()
    with work.around(material, target) as environment:
        words = work.words(material, target)
        for each in (phase, *rng.choices(work.phases, k=rng.choice((1, 2, 3)))):
            if each == ANY:
                _signalled(process, place, words, environment, undisturbed.whole_s, rng, outcome)
            elif undisturbed.moments[each]:
                number = any_of(undisturbed.moments[each], rng)
                dying = dying_at(each, number, place.root, place.folder() / "armed")
                if place.finish(*words, **environment | dying).process.returncode == -signal.SIGKILL:
                    outcome.killed[process, each] += 1
        done = place.finish(*words, **environment)
    found = None if done.process.returncode else work.found(target, done)
    if done.process.returncode or found != undisturbed.made:
        raise Wrong(f"{process} after kills: {_difference(found, undisturbed.made)}; {done.err[-300:]}")
    outcome.endings["resumed"] += 1


def _signalled(
    process: str,
    place: Place,
    words: list[str],
    environment: dict[str, str],
    whole_s: float,
    rng: Random,
    outcome: Outcome,
) -> None:
    command = place.spawn(*words, **environment)
    time.sleep(rng.uniform(0.05, whole_s))
    command.signal(rng.choice(SIGNALS))
    if command.wait(60, interrupted=True) in ENDED:
        outcome.killed[process, ANY] += 1


def _difference(found: Any, made: Any) -> str:
    return f"found {str(found)[:400]}, expected {str(made)[:400]}"


ATTEMPTS = {name: (partial(kill, name), work.phases) for name, work in WORKS.items()}
