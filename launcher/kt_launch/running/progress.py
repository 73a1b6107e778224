"""What the terminal shows while a server comes up: its phases, read from SGLang's log, and when it should be ready,
learnt from earlier runs of the same model on this host.
"""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.plan import LaunchPlan

# First line of SGLang's log that belongs to a phase; an unknown wording costs a progress line, nothing else.
PHASES = (
    ("weights", re.compile(r"Load weight begin")),
    ("adapters", re.compile(r"LoRA adapter loading starts|Using \S+ as backend of LoRA kernels")),
    ("memory", re.compile(r"KV Cache is allocated|Memory pool end")),
    ("compile and capture", re.compile(r"Capture target decode CUDA graph begin")),
    ("warm-up", re.compile(r"Application startup complete|Uvicorn running")),
)
LAST_PHASE = "ready"
FILE = "timings.json"
EARLIER_RUNS = 5
SEARCHED_RUNS = 100
SAME = ("model.path", "kt.method", "server.device")
"""Values of a plan that must be the same for an earlier run to tell anything."""


class Progress:
    """Prints each phase once, with the seconds since the start; notes them in the run folder's timings.json."""

    def __init__(self, plan: LaunchPlan, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._started = time.monotonic()
        self._seen: dict[str, float] = {}
        self._expected = expect_phases(plan, run_folder)
        self._live = sys.stderr.isatty()
        self._shown_at = 0.0

    def __enter__(self) -> Progress:
        self.phase("start")
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        write_json(self._run_folder / FILE, self._seen)

    def log_line(self, line: str) -> None:
        """Look for the beginning of a phase in one line of SGLang's log."""
        for name, pattern in PHASES:
            if name not in self._seen and pattern.search(line):
                self.phase(name)

    def phase(self, name: str) -> None:
        """A phase begins now."""
        self._seen[name] = round(self._elapsed, 2)
        self._clear()
        print(f"  {self._seen[name]:6.1f} s  {name}{self._outlook(name)}", file=sys.stderr, flush=True)

    def tick(self) -> None:
        """Time has passed; on a terminal, the last line follows it."""
        if not self._live or self._elapsed - self._shown_at < 1:
            return
        self._shown_at = self._elapsed
        name = next(reversed(self._seen))
        print(f"\r\033[K  {self._elapsed:6.1f} s  {name}{self._outlook(name)}", end="", file=sys.stderr, flush=True)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _outlook(self, phase: str) -> str:
        left = time_left(self._expected, phase, self._elapsed, self._seen[phase])
        return "" if left is None else f" (ready in about {left:.0f} s)"

    def _clear(self) -> None:
        if self._live and self._shown_at:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def time_left(expected: Mapping[str, float], phase: str, elapsed: float, phase_began: float) -> float | None:
    """Seconds from now until ready: what followed the beginning of this phase earlier, less what of it is over."""
    if phase == LAST_PHASE or phase not in expected:
        return None
    return max(expected[LAST_PHASE] - expected[phase] - (elapsed - phase_began), 0.0)


def expect_phases(plan: LaunchPlan, run_folder: Path) -> dict[str, float]:
    """Phase -> seconds after the start, the median of the latest runs like this one; empty where there was none."""
    earlier = []
    folders = [folder for folder in run_folder.parent.iterdir() if folder != run_folder]
    for folder in sorted(folders, reverse=True)[:SEARCHED_RUNS]:
        timings = read_json_or_empty(folder / FILE)
        if LAST_PHASE in timings and _is_alike(plan, folder):
            earlier.append(timings)
        if len(earlier) == EARLIER_RUNS:
            break
    names = {name for timings in earlier for name in timings}
    return {name: statistics.median(timings[name] for timings in earlier if name in timings) for name in names}


def _is_alike(plan: LaunchPlan, folder: Path) -> bool:
    other, lock = read_json_or_empty(folder / "plan.json").get("resolved", {}), read_json_or_empty(folder / "lock.json")
    if lock.get("machine", {}).get("name", platform.node()) != platform.node():
        return False
    return all(other.get(key, {}).get("value") == plan.value(key) for key in SAME if key in plan.resolved)
