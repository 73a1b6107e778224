"""Progress on the terminal while a server starts: its phases, read from its log, what it is doing, and when it should
be ready, estimated from earlier runs of the same model on this host. On a terminal the last line is updated in place,
with a bar if the amount of work is known; elsewhere, a long phase prints a line every few seconds.
"""

from __future__ import annotations

import contextlib
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kt_launch.runs.best_effort import best_effort
from kt_model.contract import PROGRESS
from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

# For each phase, the log line that begins it; if SGLang changes the wording, only a progress line is lost.
PHASES = (
    ("import SGLang", re.compile(r"kt-launch progress: import ")),
    ("processes", re.compile(r"server_args=")),
    ("model code", re.compile(r"Memory baseline taken|Init torch distributed ends")),
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
"""Values of a plan that must be equal for an earlier run to be comparable."""
HEARTBEAT_S, LIVE_S = 10.0, 0.25
"""Seconds between updates of a long phase: in plain lines, and on a terminal."""
BAR_WIDTH = 12


class Progress:
    """Prints each phase once, with the seconds since the start; records them in the run folder's timings.json."""

    def __init__(self, plan: LaunchPlan, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._started = time.monotonic()
        self._seen: dict[str, float] = {}
        self._expected = expect_phases(plan, run_folder)
        self._now = Activity()
        self._compilers: Sequence[str] = ()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._told_at = 0.0
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        self.phase("start")
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._heart.join()
        if self._bar:
            self._bar.stop()
        with best_effort(self._run_folder / FILE):
            write_json(self._run_folder / FILE, self._seen)

    def log_line(self, line: str) -> None:
        """Look for the beginning of a phase, or its progress, in one line of the server's log."""
        for name, pattern in PHASES:
            if name not in self._seen and pattern.search(line):
                self.phase(name)
        if found := PROGRESS.search(line):
            done, total = int(found["done"]), int(found["total"] or 0)
            self._now = Activity(printable(found["what"] or ""), done, total, found["unit"])

    def phase(self, name: str) -> None:
        """Record that a phase begins now."""
        with self._lock:
            self._seen[name] = round(self._elapsed, 2)
            self._now = Activity()
            if self._bar:
                self._show(self._bar, name)
            self._say(f"{name}{self._outlook(name)}")

    def at(self, what: str) -> None:
        """Record what the phase is doing."""
        self._now = Activity(what)

    def compiling(self, compilers: Sequence[str]) -> None:
        """Record the compilers that the server is running."""
        self._compilers = compilers

    def _beat(self) -> None:
        while not self._over.wait(LIVE_S if self._bar else HEARTBEAT_S / 10):
            with self._lock, contextlib.suppress(OSError, ValueError):  # the main thread handles a closed terminal
                name = next(reversed(self._seen))
                if self._bar:
                    self._show(self._bar, name)
                elif self._elapsed - self._told_at >= HEARTBEAT_S:
                    detail = self._detail()
                    self._say(f"{name}{f': {detail}' if detail else ''}{self._outlook(name)}")

    def _show(self, bar: Bar, name: str) -> None:
        now, detail = self._now, self._detail()
        left = time_left(self._expected, name, self._elapsed, self._seen[name])
        outlook = "" if left is None else f", {left:.0f} s left"
        text = f"{self._elapsed:8.1f} s  {name}{outlook}{f': {detail}' if detail else ''}"
        bar.update(bar.tasks[0].id, description=text, completed=now.done, total=now.total or None, refresh=True)

    def _say(self, text: str) -> None:
        self._told_at = self._elapsed
        line = f"  {self._elapsed:6.1f} s  {text}"
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line, file=sys.stderr)

    def _detail(self) -> str:
        compiling = f"compiling ({', '.join(self._compilers)})" if self._compilers else ""
        return ", ".join(filter(None, (str(self._now), compiling)))

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _outlook(self, phase: str) -> str:
        left = time_left(self._expected, phase, self._elapsed, self._seen[phase])
        return "" if left is None else f" (ready in about {left:.0f} s)"


class Activity:
    """What a phase is doing: a count, a total and a name; empty if unknown."""

    def __init__(self, what: str = "", done: int = 0, total: int = 0, unit: str = "") -> None:
        self.what, self.done, self.total, self.unit = what, done, total, unit

    def __str__(self) -> str:
        of = f" of {self.total:,}" if self.total else ""
        count = f"{self.done:,}{of} {self.unit}" if self.unit else ""
        return ", ".join(filter(None, (count, self.what)))


def _bar() -> Bar:
    """A line updated in place, as wide as the terminal; rich honours NO_COLOR."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(stderr=True, highlight=False)
    text = TextColumn(
        "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
    )
    bar = BarColumn(bar_width=BAR_WIDTH)
    made = Progress(bar, text, console=console, transient=True, auto_refresh=False, redirect_stdout=False, expand=True)
    made.add_task("", total=None)
    return made


def time_left(expected: Mapping[str, float], phase: str, elapsed: float, phase_began: float) -> float | None:
    """Seconds until ready: what followed the beginning of this phase in earlier runs, less the time already spent in
    it."""
    if phase == LAST_PHASE or phase not in expected:
        return None
    return max(expected[LAST_PHASE] - expected[phase] - (elapsed - phase_began), 0.0)


def expect_phases(plan: LaunchPlan, run_folder: Path) -> dict[str, float]:
    """Phase -> seconds after the start, the median of the latest comparable runs; empty if there are none."""
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
