"""Chaos: processes killed in every phase, hostile files and requests, hangs, full disks and races, for so many minutes.

make chaos CHAOS='[--minutes 30] [--seed N] [--only NAME[/PHASE][:SEED]] [--report FILE]'

Two lanes run side by side, one of commands and one of servers. Exit code 1 unless nothing was wrong and nothing was
left behind; a failure prints the line that repeats it alone.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import callers
import commands
import contested
import servers
from outcomes import Outcome, Report
from place import Place, Wrong

from kt_model.nearest import nearest_name
from kt_model.parent_death import die_with_parent

Attempt = Callable[[Place, commands.Material, Random, Outcome, str], None]
Attempts = Mapping[str, tuple[Attempt, tuple[str, ...]]]
"""Name -> what is tried, and its phases; ('',) where it has none."""
LANES: Mapping[str, Attempts] = {
    "commands": {**commands.ATTEMPTS, **contested.ATTEMPTS},
    "servers": {**servers.ATTEMPTS, **callers.ATTEMPTS},
}
ATTEMPTS: Attempts = {name: each for lane in LANES.values() for name, each in lane.items()}
LASTS_S = {"commands": 30.0, "servers": 150.0}
"""What an attempt may take, until one has taken longer: none is begun with less time left."""

MANY = 8
"""Phases of a kind, for each so many of which it has a turn at a time."""


class NoSuchAttempt(Exception):
    """In the words of the command line."""


def names_of(attempts: Attempts) -> list[str]:
    """Of a whole round, without seeds."""
    return [f"{name}/{phase}".rstrip("/") for name, (_, phases) in attempts.items() for phase in phases]


def endless(lane: str, seed: int) -> Iterator[str]:
    """One round after another, each in an order of its own, in which every kind has had a turn before one has its
    next; kinds of very many phases have several."""
    for turn in itertools.count():
        rng = Random(seed + turn)
        waiting = [rng.sample(names_of({kind: each}), len(each[1])) for kind, each in LANES[lane].items()]
        at_once = [-(-len(names) // MANY) for names in waiting]
        order: list[str] = []
        while any(waiting):
            together = [names.pop() for names, count in zip(waiting, at_once, strict=True) for _ in names[:count]]
            order += rng.sample(together, len(together))
        yield from (f"{name}:{seed + 1000 * turn + number}" for number, name in enumerate(order))


def chosen(asked: str, seed: int) -> list[str]:
    """The attempts that --only means: one, or all phases of a kind. Raises NoSuchAttempt."""
    name, colon, own = asked.partition(":")
    if colon and not own.isdecimal():
        raise NoSuchAttempt(f"{own or 'nothing'} is no seed, expected a number after {name}:")
    found = [each for each in names_of(ATTEMPTS) if name in (each, each.partition("/")[0])]
    if not found:
        near = nearest_name(name, [*ATTEMPTS, *names_of(ATTEMPTS)])
        fix = f"Did you mean {near}?" if near else f"Choose from {', '.join(ATTEMPTS)}."
        raise NoSuchAttempt(f"no attempt {name}. {fix}")
    return [f"{each}:{own or seed}" for each in found]


def attempt(place: Place, material: commands.Material, name: str) -> Outcome:
    """One, and what is left of it."""
    kind, _, seed = name.partition(":")
    kind, _, phase = kind.partition("/")
    outcome, began = Outcome(name), time.monotonic()
    try:
        ATTEMPTS[kind][0](place, material, Random(int(seed)), outcome, phase)
    except Wrong as failure:
        outcome.wrong.append(str(failure))
    except Exception as failure:
        outcome.wrong.append(f"{type(failure).__name__}: {failure}")
    if outcome.wrong:
        place.end_commands()
    late = place.late_processes()
    servers.remove_abandoned_in(place)
    outcome.left_behind = late + place.left_files()
    place.clear()
    outcome.seconds = time.monotonic() - began
    return outcome


def run_lane(names: Iterator[str], deadline: float, lasts_s: float, parent: int, results: Connection) -> None:
    """In a process of its own, to which its orphans come; it goes with its parent."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with Place() as place:
        material = commands.Material(place)
        for name in names:
            if time.monotonic() + lasts_s > deadline:
                break
            results.send(outcome := attempt(place, material, name))
            lasts_s = max(lasts_s, outcome.seconds)


def run_lanes(lanes: Mapping[str, Iterator[str]], minutes: float, report: Report) -> None:
    """Side by side, until the time is over or the attempts are."""
    context, deadline = multiprocessing.get_context("fork"), time.monotonic() + 60 * minutes
    running: dict[Any, multiprocessing.process.BaseProcess] = {}
    for lane, names in lanes.items():
        receiving, sending = context.Pipe(duplex=False)
        arguments = (names, deadline, LASTS_S[lane], multiprocessing.current_process().pid, sending)
        running[receiving] = context.Process(target=run_lane, args=arguments, name=lane)
        running[receiving].start()
        sending.close()
    try:
        while running:
            for ready in wait(list(running)):
                connection: Any = ready
                try:
                    report.add(connection.recv())
                except EOFError:
                    process = running.pop(connection)
                    process.join()
                    if process.exitcode:
                        report.add(Outcome(process.name, wrong=[f"the lane ended with exit code {process.exitcode}"]))
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def read_arguments() -> argparse.Namespace:
    """Mistakes are a line and exit code 2."""
    reader = argparse.ArgumentParser()
    reader.add_argument("--minutes", type=float, default=30.0)
    reader.add_argument("--seed", type=int, default=int(time.time()))
    reader.add_argument("--only", help="attempts, as NAME, NAME/PHASE or NAME/PHASE:SEED")
    reader.add_argument("--report", type=Path)
    asked = reader.parse_args()
    if not asked.minutes > 0:
        reader.exit(2, f"error: --minutes: {asked.minutes:g} is no time to run\n")
    if asked.report and not asked.report.parent.is_dir():
        reader.exit(2, f"error: --report: there is no folder {asked.report.parent}\n")
    try:
        asked.names = asked.only and chosen(asked.only, asked.seed)
    except NoSuchAttempt as mistake:
        reader.exit(2, f"error: --only: {mistake}\n")
    return asked


def main() -> int:
    asked = read_arguments()
    report, planned = Report(asked.report, asked.seed), []
    if asked.names:
        run_lanes({"commands": iter(asked.names)}, 24 * 60, report)
    else:
        planned = names_of(ATTEMPTS)
        run_lanes({lane: endless(lane, asked.seed) for lane in LANES}, asked.minutes, report)
    print(report.summary(planned))
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
