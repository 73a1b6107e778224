"""action=logs: the last lines of a run's server log; with logs.follow=true, also new lines until the run ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import RUN_KEYS, Page
from kt_launch.machine.folders import runs_folder
from kt_launch.runs.runs import find_run, run_word
from kt_launch.runs.state import read_state
from kt_model.atomic_file import read_end
from kt_model.errors import LaunchError, command
from kt_model.printable import KEPT, printable, say

PAGE = Page(
    ("Shows the last lines of a run's server log; logs.follow=true follows it until the run ends.",),
    (("kt-launch logs", ""), ("kt-launch logs RUN logs.lines=50", "")),
    (*RUN_KEYS, "logs."),
)

POLL_S = 0.2


def run(job: Job) -> None:
    job.problems.raise_if_any()
    found = find_run(runs_folder(job.config.paths.runs), job.config.run, living=True)
    log_file = found.folder / "server.log"
    if not log_file.is_file():
        fix = f"{command('status', run_word(found.folder))} shows its state."
        raise LaunchError("run", f"{found.name} has no server.log: no server was started", fix)
    for line in last_lines(log_file, job.config.logs.lines):
        say(line, kept="\t")
    if job.config.logs.follow:
        for text in follow(log_file, lambda: _lives(found.folder)):
            print(printable(text, KEPT), end="", flush=True)


def last_lines(file: Path, count: int) -> list[str]:
    """Without line ends."""
    lines = read_end(file).removesuffix("\n").split("\n")
    return lines[-count:] if count and lines != [""] else []


def follow(file: Path, lives: Callable[[], bool]) -> Iterator[str]:
    """Everything appended from now on, including to a new file of that name after a restart, until the run ends."""
    log = file.open(encoding="utf-8", errors="replace")
    log.seek(0, os.SEEK_END)
    try:
        while True:
            last_look = not lives()
            if text := log.read():
                yield text
            elif file.exists() and file.stat().st_ino != os.fstat(log.fileno()).st_ino:
                log.close()
                log = file.open(encoding="utf-8", errors="replace")
            elif last_look:
                return
            else:
                time.sleep(POLL_S)
    finally:
        log.close()


def _lives(folder: Path) -> bool:
    state = read_state(folder)
    return state is not None and state.lives
