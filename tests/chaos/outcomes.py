"""What a chaos run says: tried, survived, wrong, left behind, and which processes died when; each failure with the line
that repeats it alone.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPEAT = "make chaos CHAOS='--only {name}'"


@dataclass
class Outcome:
    """Of one attempt, which its name repeats."""

    name: str
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(process, phase) -> how often it was killed then."""
    endings: Counter[str] = field(default_factory=Counter)
    """How what was disturbed went on: restarted, named (ended with the cause told), resumed, refused, right."""
    wrong: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def survived(self) -> bool:
        return not self.wrong and not self.left_behind

    @property
    def kills(self) -> int:
        return self.killed.total()

    def as_dict(self) -> dict[str, object]:
        killed = {f"{process}, {phase}": count for (process, phase), count in self.killed.items()}
        return vars(self) | {"killed": killed, "endings": dict(self.endings)}


class Report:
    """All outcomes so far; written anew after each, so that a run which is ended leaves what it knew."""

    def __init__(self, file: Path | None, seed: int, planned: Sequence[str] = ()) -> None:
        """planned: attempts of a whole round, by their names without seeds."""
        self._file, self._seed, self._planned, self._began = file, seed, planned, time.monotonic()
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        state = "survived" if outcome.survived else "WRONG"
        kills = Counter({"killed": outcome.kills}) + outcome.endings
        words = ", ".join(f"{count} {ending}" for ending, count in kills.items())
        print(f"{outcome.seconds:6.1f} s  {state:8}  {outcome.name}  ({words})", flush=True)
        for text in (*outcome.wrong, *(f"left behind: {each}" for each in outcome.left_behind)):
            print(f"           {text}", flush=True)
        if not outcome.survived:
            print(f"           {REPEAT.format(name=outcome.name)}", flush=True)
        if self._file:
            self._file.write_text(json.dumps(self.as_dict(), indent=1))

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    @property
    def clean(self) -> bool:
        return bool(self.outcomes) and all(each.survived for each in self.outcomes)

    @property
    def killed(self) -> Counter[tuple[str, str]]:
        return sum((each.killed for each in self.outcomes), Counter())

    def as_dict(self) -> dict[str, object]:
        endings: Counter[str] = sum((each.endings for each in self.outcomes), Counter())
        return {
            "seed": self._seed,
            "cores": os.cpu_count(),
            "minutes": round(self.minutes, 1),
            "tried": len(self.outcomes),
            "survived": sum(each.survived for each in self.outcomes),
            "wrong": sum(bool(each.wrong) for each in self.outcomes),
            "left behind": sum(len(each.left_behind) for each in self.outcomes),
            "kills": self.killed.total(),
            "killed": {process: dict(self._phases(process)) for process in sorted({name for name, _ in self.killed})},
            "endings": dict(endings),
            "without a turn": self.without_turn(),
            "without a kill": self.without_kill(),
            "attempts": [each.as_dict() for each in self.outcomes],
        }

    def without_turn(self) -> list[str]:
        """Planned attempts that nothing was tried of."""
        tried = {_without_seed(each) for each in self.outcomes}
        return [name for name in self._planned if name not in tried]

    def without_kill(self) -> list[str]:
        """Phases that were tried, but in which no process died."""
        kills: Counter[str] = Counter()
        for each in self.outcomes:
            kills[_without_seed(each)] += each.kills
        return [name for name, count in kills.items() if "/" in name and not count]

    def summary(self) -> str:
        """On a terminal."""
        facts = self.as_dict()
        first = ", ".join(f"{name} {facts[name]}" for name in ("tried", "survived", "wrong", "left behind", "kills"))
        lines = [f"chaos: {first} in {facts['minutes']} minutes with seed {facts['seed']} on {facts['cores']} cores"]
        endings: Counter[str] = sum((each.endings for each in self.outcomes), Counter())
        lines.append(f"       {', '.join(f'{count} {ending}' for ending, count in endings.items())}")
        for process in sorted({name for name, _ in self.killed}):
            phases = ", ".join(f"{phase} {count}" for phase, count in sorted(self._phases(process)))
            lines.append(f"       killed: {process} ({phases})")
        for what in ("without a turn", "without a kill"):
            if names := facts[what]:
                assert isinstance(names, list)
                lines.append(f"       {what} this time: {', '.join(names)}")
        return "\n".join(lines)

    def _phases(self, process: str) -> list[tuple[str, int]]:
        return [(phase, count) for (name, phase), count in self.killed.items() if name == process]


def _without_seed(outcome: Outcome) -> str:
    return outcome.name.partition(":")[0]
