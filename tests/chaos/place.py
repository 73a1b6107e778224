"""The place of a chaos run: folders of its own, kt-launch as a process in it, and what is left behind when it is over.

Every orphan comes to this process, so that none is out of reach; temporary files lie where they are counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from outcomes import Outcome

from kt_launch.machine.shared_memory import shared_files

KT_LAUNCH = (sys.executable, "-P", "-m", "kt_launch")
PR_SET_CHILD_SUBREAPER = 36
CHAT = "action=chat"
"""The one command that reads what is typed."""
FINISHED_S = 300.0
GONE_S = 60.0
"""A process that was told to end, or lost its launcher, is gone after this."""
KEPT = ("torchinductor_",)
"""Temporary folders that are meant to stay: what torch compiled."""
HUBS_OWN = "trees"
"""A folder in which the Hub's package has lists of files, and drafts of them that may be those of others."""


class Wrong(Exception):
    """What must not happen has happened."""


class Place:
    """Folders for runs, cache, temporary files and whatever else."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored, and all that is started here would too
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a script's background jobs have this
        self.root = Path(tempfile.mkdtemp(prefix="ktc-"))
        for name in ("runs", "cache", "t", "work"):
            (self.root / name).mkdir()
        self.temporary, self.runs, self.work = self.root / "t", self.root / "runs", self.root / "work"
        own = {"KT_LAUNCH_RUNS": str(self.runs), "KT_LAUNCH_CACHE": str(self.root / "cache")}
        self.environment = {**os.environ, **own, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        self._lasting: set[Path] = set()
        self._commands: list[Command] = []
        self._used: set[Path] = set()
        """Files of shared memory that a process from here has used."""
        self._over = threading.Event()
        self._count = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            self._used |= shared_files(each.pid for each in self.processes())

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._over.set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.reap()
        shutil.rmtree(self.root, ignore_errors=True)

    def folder(self) -> Path:
        """A new one."""
        self._count += 1
        made = self.work / str(self._count)
        made.mkdir()
        return made

    def keep(self, folder: Path) -> Path:
        """Not removed between attempts."""
        self._lasting.add(folder)
        return folder

    def end_commands(self) -> None:
        """Those that an attempt that went wrong has left running; what they started goes with them."""
        for command in self._commands:
            command.signal(signal.SIGKILL)
            command.process.wait()

    def clear(self) -> None:
        """What the attempt wrote goes: its folders, and its runs."""
        self._commands.clear()
        for folder in (*self.work.iterdir(), *self.runs.iterdir()):
            if folder not in self._lasting:
                shutil.rmtree(folder, ignore_errors=True)

    def spawn(self, *words: str, **environment: str) -> Command:
        """kt-launch with these words."""
        self._commands.append(Command(self, words, self.folder(), environment))
        return self._commands[-1]

    def finish(self, *words: str, **environment: str) -> Command:
        """The same, to its end."""
        command = self.spawn(*words, **environment)
        command.wait(FINISHED_S)
        return command

    def processes(self) -> list[psutil.Process]:
        """All that were started here and live."""
        return [each for each in psutil.Process().children(recursive=True) if _lives(each)]

    def reap(self) -> None:
        """Take leave of orphans that have ended."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def late_processes(self) -> list[str]:
        """Those that live after their time; they are killed then."""
        deadline = time.monotonic() + GONE_S
        while (living := self.processes()) and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.1)
        self.reap()
        found = [f"process {each.pid}: {_command(each)}" for each in living]
        for each in living:
            with contextlib.suppress(psutil.Error):
                each.kill()
        return found

    def left_files(self) -> list[str]:
        """Shared memory of processes that are gone, temporary files, and drafts in the folders of users."""
        found = [str(path) for path in sorted(self._used) if path.exists()]
        self._used = set()
        drafts = (path for folder in (self.work, self.root / "cache") for path in folder.rglob("*.tmp"))
        found += [str(path) for path in drafts if path.parent.name != HUBS_OWN]
        return found + [str(path) for path in self.temporary.iterdir() if not path.name.startswith(KEPT)]


class Command:
    """One kt-launch; what it says is in files, and what is typed into it comes from here."""

    def __init__(self, place: Place, words: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        self.out_file, self.err_file = folder / "out", folder / "err"
        self._place = place
        with self.out_file.open("wb") as out, self.err_file.open("wb") as err:
            self.process = subprocess.Popen(
                [*KT_LAUNCH, *words],
                cwd=folder,
                env=place.environment | environment,
                stdin=subprocess.PIPE if CHAT in words else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self.out_file.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.err_file.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def type(self, line: str) -> None:
        """A line of its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def wait(self, timeout_s: float, interrupted: bool = False) -> int:
        """Its exit code. Raises Wrong when it takes longer, or shows a traceback. interrupted: one of Python alone,
        from before or after all that is ours, does not count."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Wrong(f"did not end within {timeout_s:g} s: {self.err[-300:]}") from None
        _, found, trace = self.err.partition("Traceback (most recent call last)")
        if found and not (interrupted and "/kt_" not in trace):
            raise Wrong(f"a traceback: {self.err[-500:]}")
        return code

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self, process: str, phase: str, outcome: Outcome) -> None:
        """The command's own process, if it has not ended yet."""
        self.signal(signal.SIGKILL)
        if self.process.wait() == -signal.SIGKILL:
            outcome.killed[process, phase] += 1

    def parts(self, what: str) -> list[psutil.Process]:
        """Living processes below it whose command line has this in it."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [each for each in below if what in _command(each) and _lives(each)]


def wait_until(holds: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises Wrong when it never holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise Wrong(f"{what}: not after {timeout_s:g} s")
        time.sleep(0.05)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


@contextlib.contextmanager
def at_work(process: psutil.Process) -> Iterator[None]:
    """Stopped in the block, and going on after it."""
    kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(process, signal.SIGCONT)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return ""
