"""Commands that end by themselves, killed at any moment, run on full disks and against each other: what is made at last
is what an undisturbed one makes.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random

import tiny_files
import weight_files
from outcomes import Outcome
from place import Command, Place, Wrong, digests
from small_disk import in_small_disk

NUMBERS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ON_FULL_DISK = Path(__file__).parents[1] / "support" / "on_full_disk.py"


class Material:
    """A checkpoint and an adapter, and what quantize and merge make of them when nobody disturbs them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        folder = place.folder()
        self.checkpoint = weight_files.write_checkpoint(
            folder / "m", shards=3, num_hidden_layers=16, moe_intermediate_size=256, hidden_size=256
        )
        tiny_files.write_checkpoint(folder / "tiny")
        self.tiny = folder / "tiny"
        self.adapter = tiny_files.write_adapter(folder / "west")
        self.larger_adapter = weight_files.write_adapter(folder / "larger", self.checkpoint)
        self.whole_s: dict[str, float] = {}
        self.expected = {kind: self._make(kind, folder / f"expected-{kind}") for kind in ("quantize", "merge")}

    def words(self, kind: str, target: Path) -> list[str]:
        if kind == "quantize":
            return ["action=quantize", f"model={self.checkpoint}", "kt=int8", f"kt.weight_path={target}"]
        return ["action=merge", f"model={self.checkpoint}", f"lora={self.larger_adapter}", f"merge.path={target}"]

    def _make(self, kind: str, target: Path) -> dict[str, str]:
        began = time.monotonic()
        done = self._place.finish(*self.words(kind, target))
        if done.process.returncode:
            raise SystemExit(f"chaos: {kind} does not work at all: {done.err}")
        self.whole_s[kind] = time.monotonic() - began
        return digests(target)


def kill_weights(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """quantize or merge killed several times in a row, then run to its end: the same bytes."""
    kind = rng.choice(("quantize", "quantize", "merge"))
    target = place.folder() / "made"
    for _ in range(rng.choice((2, 3, 4))):
        command = place.spawn(*material.words(kind, target))
        time.sleep(rng.uniform(0.2, material.whole_s[kind]))
        command.signal(rng.choice(NUMBERS))
        outcome.kills += 1
        command.wait(30)
    done = place.finish(*material.words(kind, target))
    if done.process.returncode or digests(target) != material.expected[kind]:
        raise Wrong(f"{kind} after kills: exit code {done.process.returncode}, other bytes, or both: {done.err[-300:]}")
    outcome.endings["resumed"] += 1


def kill_sweep(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """A sweep of plans killed, then run again in the same folder."""
    folder = place.folder() / "sweep"
    words = ["-m", "action=plan", f"model={material.tiny}", "server.device=cpu", f"sweep.folder={folder}"]
    words.append("server.context_length=64,128")
    for _ in range(2):
        command = place.spawn(*words)
        time.sleep(rng.uniform(0.2, 2.5))
        command.signal(rng.choice(NUMBERS))
        outcome.kills += 1
        command.wait(30)
    done = place.finish(*words)
    if done.process.returncode or not json.loads((folder / "sweep.json").read_text())["done"]:
        raise Wrong(f"the sweep does not go on: {done.err[-300:]}")
    outcome.endings["resumed"] += 1


def kill_readers(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """Commands that write nothing: killed, they leave nothing, and the next one works."""
    for action in rng.sample(("plan", "inspect", "runs", "schema", "config", "explain"), 3):
        command = place.spawn(f"action={action}", f"model={material.tiny}", f"lora={material.adapter}")
        time.sleep(rng.uniform(0.05, 1.0))
        command.signal(signal.SIGKILL)
        outcome.kills += 1
        command.wait(30)
    if place.finish("action=plan", f"model={material.tiny}", "server.device=cpu").process.returncode:
        raise Wrong("plan does not work after kills")
    outcome.endings["right"] += 1


def race_for_folder(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """Several at once make the same folder, or work on the same sweep."""
    target = place.folder() / "made"
    together = [place.spawn(*material.words("quantize", target)) for _ in range(3)]
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.2, material.whole_s["quantize"]))
        together[0].signal(signal.SIGKILL)
        outcome.kills += 1
    codes = [each.wait(120) for each in together]
    if any(codes[1:]) or digests(target) != material.expected["quantize"]:
        raise Wrong(f"three at once: exit codes {codes}, other bytes, or both: {together[1].err[-300:]}")
    sweep = ["-m", "action=plan", f"model={material.tiny}", "server.device=cpu", f"sweep.folder={target}-sweep"]
    both = [place.spawn(*sweep, "server.context_length=64,128") for _ in range(2)]
    ended = sorted(each.wait(60) for each in both)
    if ended not in ([0, 0], [0, 2]) or (ended[1] and "another kt-launch is running the sweep" not in _all(both)):
        raise Wrong(f"two sweeps in one folder: exit codes {ended}: {_all(both)[-300:]}")
    outcome.endings["right"] += 1


def fill_disk(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """Any command, on a disk with any room left: one line, or it works."""
    disk = place.folder()
    own = [f"model={material.tiny}", "server.device=cpu", f"paths.runs={disk / 'runs'}"]
    choices = (
        ["action=export", "export.format=compose", f"export.path={disk / 'a' / 'unit'}"],
        ["-m", "action=plan", "server.context_length=64,128"],
        ["action=merge", f"lora={material.adapter}", f"merge.path={disk / 'merged'}"],
        ["action=quantize", "kt=int8", f"kt.weight_path={disk / 'q'}"],
        ["action=config"],
    )
    asked = [[rng.choice((0, 4, 8, 16, 32, 64)), [*own, *rng.choice(choices)]] for _ in range(6)]
    cache = {"KT_LAUNCH_CACHE": f"{disk}/cache"}
    done = in_small_disk(disk, sys.executable, str(ON_FULL_DISK), str(disk), json.dumps(asked), **cache)
    if done.returncode:
        raise Wrong(f"{asked}: {done.stderr[-500:]}")
    for (left, words), found in zip(asked, json.loads(done.stdout), strict=True):
        drafts = [name for name in found["files"] if name.endswith(".tmp")]
        if found["code"] not in (0, 2, 3) or "Traceback" in found["err"] or drafts:
            raise Wrong(f"{left} KiB left, {words}: exit code {found['code']}, {drafts}, {found['err'][-300:]}")
        outcome.endings["refused" if found["code"] else "right"] += 1


def damage_weights(place: Place, material: Material, rng: Random, outcome: Outcome) -> None:
    """A byte of what was made is another one: no command takes it for what it was."""
    target = place.folder() / "made"
    place.finish(*material.words("quantize", target))
    shard = rng.choice(sorted(target.glob("layer-*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[-1 - rng.randrange(len(content) // 2)] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    words = ["action=serve", f"model={material.checkpoint}", "kt=int8", f"kt.weight_path={target}", "lora=none"]
    done = place.finish(*words, "server.device=cpu", timeout_s=60)
    if done.process.returncode != 2 or len(done.errors) != 1:
        raise Wrong(f"a changed byte: exit code {done.process.returncode}, {done.err[-300:]}")
    shutil.rmtree(target)
    outcome.endings["refused"] += 1


def _all(commands: list[Command]) -> str:
    return "".join(each.err for each in commands)
