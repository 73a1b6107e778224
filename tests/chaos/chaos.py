"""Chaos: processes killed in every phase, hostile files and requests, hangs, full disks and races, for so many minutes.

make chaos CHAOS='[--minutes 30] [--seed N] [--only NAME[/PHASE][:SEED]] [--report FILE]'

Two lanes run side by side, one of commands and one of servers; the one whose round is over first takes over attempts
of the other. Exit code 1 unless nothing was wrong and nothing was left behind; a failure prints the line that
repeats it alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
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
LASTS_S = {"commands": 30.0, "servers": 60.0}
"""What an attempt of a kind may take, until one of it has shown that: none is begun with less time left."""

MANY = 8
"""Phases of a kind, for each so many of which it has a turn at a time."""


class NoSuchAttempt(Exception):
    """In the words of the command line."""


def names_of(attempts: Attempts) -> list[str]:
    """Of a whole round, without seeds."""
    return [f"{name}/{phase}".rstrip("/") for name, (_, phases) in attempts.items() for phase in phases]


def round_of(attempts: Attempts, seed: int) -> list[str]:
    """All of a lane's, in an order in which every kind has had a turn before one has its next; kinds of very many
    phases have several."""
    rng = Random(seed)
    waiting = [rng.sample(names_of({kind: each}), len(each[1])) for kind, each in attempts.items()]
    at_once = [-(-len(names) // MANY) for names in waiting]
    order: list[str] = []
    while any(waiting):
        together = [names.pop() for names, count in zip(waiting, at_once, strict=True) for _ in names[:count]]
        order += rng.sample(together, len(together))
    return order


class Rounds:
    """Which attempt is next: no phase has a second turn before all phases of both lanes have had their first."""

    def __init__(self, lanes: Mapping[str, Attempts], seed: int) -> None:
        self._lanes, self._seed = lanes, seed
        self._turns = dict.fromkeys(lanes, 0)
        self._waiting = {lane: round_of(attempts, seed) for lane, attempts in lanes.items()}
        self._lasts_s = {kind: LASTS_S[lane] for lane, attempts in lanes.items() for kind in attempts}
        self._seen: set[str] = set()
        self._number = 0

    def take(self, own: str, left_s: float) -> str | None:
        """For the lane `own`: the next of its round, or of the other's while that is at an earlier one. Attempts that
        do not fit into the time that is left wait for those that do; None where nothing fits."""
        self._begin_rounds()
        for lane in sorted(self._lanes, key=lambda lane: (self._turns[lane], lane != own)):
            for name in self._waiting[lane]:
                if self._lasts_s[name.partition("/")[0]] < left_s:
                    self._waiting[lane].remove(name)
                    self._number += 1
                    return f"{name}:{self._seed + self._number}"
        return None

    def note(self, outcome: Outcome) -> None:
        """How long attempts of its kind last."""
        kind = outcome.name.partition(":")[0].partition("/")[0]
        before = self._lasts_s.get(kind, 0.0) if kind in self._seen else 0.0
        self._lasts_s[kind] = max(before, outcome.seconds)
        self._seen.add(kind)

    def _begin_rounds(self) -> None:
        for lane, attempts in self._lanes.items():
            if not self._waiting[lane]:
                self._turns[lane] += 1
                self._waiting[lane] = round_of(attempts, self._seed + self._turns[lane])


class Chosen:
    """Those that --only names, each once."""

    def __init__(self, names: list[str]) -> None:
        self._names = iter(names)

    def take(self, _: str, __: float) -> str | None:
        return next(self._names, None)

    def note(self, _: Outcome) -> None:
        """They need not fit into a time."""


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


def run_lane(parent: int, orders: Connection) -> None:
    """Attempts by their names until there is none, in a process of its own, to which its orphans come; it goes with its
    parent."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with Place() as place:
        material = commands.Material(place)
        orders.send(None)
        while name := orders.recv():
            orders.send(attempt(place, material, name))


def run_lanes(lanes: Iterable[str], rounds: Rounds | Chosen, minutes: float, report: Report) -> None:
    """Side by side, until the time is over or the attempts are."""
    context, deadline = multiprocessing.get_context("fork"), time.monotonic() + 60 * minutes
    running: dict[Any, multiprocessing.process.BaseProcess] = {}
    for lane in lanes:
        here, there = context.Pipe()
        arguments = (multiprocessing.current_process().pid, there)
        running[here] = context.Process(target=run_lane, args=arguments, name=lane)
        running[here].start()
        there.close()
    try:
        while running:
            for ready in wait(list(running)):
                lane_over = _serve(ready, running[ready], rounds, deadline, report)
                if lane_over:
                    running.pop(ready).join()
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _serve(lane: Any, process: Any, rounds: Rounds | Chosen, deadline: float, report: Report) -> bool:
    """Takes an outcome from a lane and hands it the next attempt. Returns whether the lane has ended."""
    try:
        outcome = lane.recv()
    except EOFError:
        process.join()
        if process.exitcode:
            report.add(Outcome(process.name, wrong=[f"the lane ended with exit code {process.exitcode}"]))
        return True
    if outcome:
        report.add(outcome)
        rounds.note(outcome)
    lane.send(rounds.take(process.name, deadline - time.monotonic()))
    return False


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
    report = Report(asked.report, asked.seed, () if asked.names else names_of(ATTEMPTS))
    if asked.names:
        run_lanes(["commands"], Chosen(asked.names), 24 * 60, report)
    else:
        run_lanes(LANES, Rounds(LANES, asked.seed), asked.minutes, report)
    print(report.summary())
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
