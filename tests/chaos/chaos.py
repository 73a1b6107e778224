"""Chaos: processes killed in every phase, hostile files and requests, hangs, full disks and races, for so many minutes.

make chaos CHAOS='[--minutes 30] [--seed N] [--only NAME] [--report FILE]'

Exit code 1 unless nothing was wrong and nothing was left behind. A failure prints the line that repeats it alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import commands
import servers
from outcomes import Outcome, Report
from place import Place, Wrong

Attempt = Callable[[Place, commands.Material, Random, Outcome], None]
ATTEMPTS: dict[str, tuple[Attempt, int]] = {
    "weights": (commands.kill_weights, 8),
    "sweep": (commands.kill_sweep, 3),
    "readers": (commands.kill_readers, 2),
    "folder": (commands.race_for_folder, 1),
    "disk": (commands.fill_disk, 2),
    "damage": (commands.damage_weights, 1),
    "hostile": (servers.hostile, 1),
    "deaths": (servers.many_deaths, 3),
    "hang": (servers.hang, 1),
    "first": (servers.first_start, 4),
    "float32": (servers.without_float32, 1),
    "port": (servers.race_for_port, 1),
}
"""Name -> what is tried, and how often in one round."""
KILLS_A_MINUTE = 100 / 30
"""At least; where servers start slowly, commands are killed in between."""
CHEAP = "weights"


def names(seed: int) -> list[str]:
    """Of one round, in its order."""
    order = [name for name, (_, count) in ATTEMPTS.items() for _ in range(count)]
    Random(seed).shuffle(order)
    return [f"{name}:{seed + number}" for number, name in enumerate(order)]


def endless(seed: int, report: Report) -> Iterator[str]:
    """One round after another, with more kills of commands where there were few kills so far."""
    extra = itertools.count(seed + 500_000)
    for first in itertools.count(seed, 1000):
        for name in names(first):
            while report.kills < KILLS_A_MINUTE * report.minutes:
                yield f"{CHEAP}:{next(extra)}"
            yield name


def attempt(place: Place, material: commands.Material, name: str) -> Outcome:
    """One, and what is left of it."""
    kind, _, seed = name.partition(":")
    outcome, began = Outcome(name), time.monotonic()
    try:
        ATTEMPTS[kind][0](place, material, Random(int(seed)), outcome)
    except Wrong as failure:
        outcome.wrong.append(str(failure))
    except Exception as failure:
        outcome.wrong.append(f"{type(failure).__name__}: {failure}")
    late = place.late_processes()
    servers.clear(place)
    outcome.left_behind = late + place.left_files()
    outcome.seconds = time.monotonic() - began
    return outcome


def main() -> int:
    reader = argparse.ArgumentParser()
    reader.add_argument("--minutes", type=float, default=30.0)
    reader.add_argument("--seed", type=int, default=int(time.time()))
    reader.add_argument("--only", help="one attempt, as NAME:SEED")
    reader.add_argument("--report", type=Path)
    asked = reader.parse_args()
    report = Report(asked.report, asked.seed)
    place, deadline = Place(), time.monotonic() + 60 * asked.minutes
    try:
        material = commands.Material(place)
        if asked.only:
            report.add(attempt(place, material, asked.only))
        for name in () if asked.only else endless(asked.seed, report):
            if time.monotonic() >= deadline:
                break
            report.add(attempt(place, material, name))
    finally:
        place.close()
    print(report.summary())
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
