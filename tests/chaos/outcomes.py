"""What a chaos run says: tried, survived, wrong, left behind; each failure with the line that repeats it alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

REPEAT = "make chaos CHAOS='--only {name}'"


@dataclass
class Outcome:
    """Of one attempt, which its name repeats."""

    name: str
    kills: int = 0
    """Processes that were killed in it."""
    endings: Counter[str] = field(default_factory=Counter)
    """How what was disturbed went on: restarted, named (ended with the cause told), resumed, refused, right."""
    wrong: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def survived(self) -> bool:
        return not self.wrong and not self.left_behind


class Report:
    """All outcomes so far; written anew after each, so that a run which is ended leaves what it knew."""

    def __init__(self, file: Path | None, seed: int) -> None:
        self._file, self._seed, self._began = file, seed, time.monotonic()
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        state = "survived" if outcome.survived else "WRONG"
        endings = ", ".join(f"{count} {ending}" for ending, count in outcome.endings.items())
        print(f"{outcome.seconds:6.1f} s  {state:8}  {outcome.name}  ({endings})", flush=True)
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
    def kills(self) -> int:
        return sum(each.kills for each in self.outcomes)

    @property
    def clean(self) -> bool:
        return bool(self.outcomes) and all(each.survived for each in self.outcomes)

    def as_dict(self) -> dict[str, object]:
        endings: Counter[str] = Counter()
        for each in self.outcomes:
            endings.update(each.endings)
        return {
            "seed": self._seed,
            "minutes": round(self.minutes, 1),
            "tried": len(self.outcomes),
            "survived": sum(each.survived for each in self.outcomes),
            "wrong": sum(bool(each.wrong) for each in self.outcomes),
            "left behind": sum(len(each.left_behind) for each in self.outcomes),
            "kills": self.kills,
            "endings": dict(endings),
            "attempts": [vars(each) | {"endings": dict(each.endings)} for each in self.outcomes],
        }

    def summary(self) -> str:
        facts = self.as_dict()
        first = ", ".join(f"{name} {facts[name]}" for name in ("tried", "survived", "wrong", "left behind", "kills"))
        endings = facts["endings"]
        assert isinstance(endings, dict)
        rest = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        return f"chaos: {first} in {facts['minutes']} minutes with seed {facts['seed']}\n       {rest}"
