"""Commands against each other for one folder or cache, on full disks, and on bytes that somebody changed."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from random import Random

from commands import PLANNED, WORKS, Material
from outcomes import Outcome
from place import Command, Place, Wrong, digests
from small_disk import in_small_disk

ON_FULL_DISK = Path(__file__).parents[1] / "support" / "on_full_disk.py"


def race_for_folder(place: Place, material: Material, rng: Random, outcome: Outcome, _: str) -> None:
    """Several at once make the same folder, one of which may be killed; or work on the same sweep."""
    target, undisturbed = place.folder(), material.undisturbed("quantize")
    words = WORKS["quantize"].words(material, target)
    together = [place.spawn(*words) for _ in range(3)]
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.2, undisturbed.whole_s))
        together[0].kill("quantize", "racing", outcome)
    codes = [each.wait(180) for each in together]
    if any(codes[1:]) or digests(target / "made") != undisturbed.made[0]:
        raise Wrong(f"three at once: exit codes {codes}, other bytes, or both: {together[1].err[-300:]}")
    sweep = WORKS["sweep"].words(material, place.folder())
    both = [place.spawn(*sweep) for _ in range(2)]
    ended = sorted(each.wait(180) for each in both)
    if ended not in ([0, 0], [0, 2]) or (ended[1] and "another kt-launch is running the sweep" not in _all(both)):
        raise Wrong(f"two sweeps in one folder: exit codes {ended}: {_all(both)[-300:]}")
    outcome.endings["right"] += 2


def race_for_cache(place: Place, material: Material, rng: Random, outcome: Outcome, _: str) -> None:
    """Several at once fill one cache, while others prune what is not finished in it and one of them is killed."""
    cache = {"KT_LAUNCH_CACHE": str(place.folder())}
    words = ["action=quantize", f"model={material.checkpoint}", "kt=int8"]
    makers = [place.spawn(*words, **cache) for _ in range(2)]
    time.sleep(rng.uniform(0.2, material.undisturbed("quantize").whole_s))
    pruning = place.spawn("action=cache", "cache.do=prune", **cache)
    makers[0].kill("quantize", "racing", outcome)
    codes = [pruning.wait(180), makers[1].wait(180), place.finish(*words, **cache).process.returncode]
    verified = place.finish("action=cache", "cache.do=verify", "format=json", **cache)
    states = [item["state"] for item in json.loads(verified.out or "[]")]
    if any(codes) or verified.process.returncode or states != ["whole"]:
        raise Wrong(
            f"one cache: exit codes {codes}, {verified.out[-300:]}, {makers[1].err[-300:]}{verified.err[-300:]}"
        )
    outcome.endings["right"] += 1


def fill_disk(place: Place, material: Material, rng: Random, outcome: Outcome, _: str) -> None:
    """Any command, on a disk with any room left: one line, or it works."""
    disk = place.folder()
    own = [f"model={material.tiny}", *PLANNED, f"paths.runs={disk / 'runs'}"]
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


def damage_weights(place: Place, material: Material, rng: Random, outcome: Outcome, _: str) -> None:
    """A byte of what was made is another one: no command takes it for what it was."""
    folder = place.folder()
    target = folder / "made"
    place.finish(*WORKS["quantize"].words(material, folder))
    shard = rng.choice(sorted(target.glob("layer-*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[-1 - rng.randrange(len(content) // 2)] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    words = ["action=serve", f"model={material.checkpoint}", "kt=int8", f"kt.weight_path={target}", "lora=none"]
    done = place.finish(*words, *PLANNED)
    if done.process.returncode != 2 or len(done.errors) != 1:
        raise Wrong(f"a changed byte: exit code {done.process.returncode}, {done.err[-300:]}")
    shutil.rmtree(target)
    outcome.endings["refused"] += 1


def _all(commands: list[Command]) -> str:
    return "".join(each.err for each in commands)


ATTEMPTS = {
    "folder": (race_for_folder, ("",)),
    "cache": (race_for_cache, ("",)),
    "disk": (fill_disk, ("",)),
    "damage": (damage_weights, ("",)),
}
