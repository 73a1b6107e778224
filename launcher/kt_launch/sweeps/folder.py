"""A sweep on disk: sweep.json with the command, and rows/<number>-<key>.json for every finished job. The key is a hash
of the job's overrides, so that its row can be found again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from kt_model.errors import EXIT_INTERRUPTED, LaunchError
from kt_model.jsonfile import first_mistake, read_json_or_empty, write_json

FORMAT = 1
OK, FAILED, CRASHED, TIMEOUT = "ok", "failed", "crashed", "timeout"
INTERRUPTED, SKIPPED = "interrupted", "skipped"
"""States that leave no row on disk: the job runs again when the sweep continues."""
NOT_ASKED = ("sweep.", "hydra.", "hydra/", "sweep=")
"""Overrides that say how a sweep is run, not what a job is."""


class Row(dict[str, Any]):
    """One job's record. float(row) is the sweep's objective, which an optimizing sweeper asks for."""

    def __float__(self) -> float:
        value = self.get("objective")
        if value is None:
            raise ValueError(f"job {self.get('number')} has no {self.get('objective_name')}: {self.get('error')}")
        return float(value)


class SweepFolder:
    """One sweep's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sweep_file, self._stop_file = path / "sweep.json", path / "stop"

    def begin(self, command: Sequence[str]) -> None:
        """Create it and record the command; clears an earlier stop."""
        (self.path / "rows").mkdir(parents=True, exist_ok=True)
        self._stop_file.unlink(missing_ok=True)
        self._write(self._sweep_file, {"format": FORMAT, "command": list(command), "done": False})

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, no other kt-launch works on this sweep. Raises LaunchError if one already does, or if the
        lock cannot be taken."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / "lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as failure:
            problem = f"another kt-launch is running the sweep in {self.path}"
            raise LaunchError("sweep.folder", problem, "Wait for it, or choose another folder.") from failure
        except OSError as failure:
            problem = f"cannot keep a sweep in {self.path} ({failure.strerror})"
            fix = "Set sweep.folder=/a/folder/you/can/write, or set KT_LAUNCH_RUNS."
            raise LaunchError("sweep.folder", problem, fix) from failure
        try:
            yield
        finally:
            lock.release()

    @property
    def is_held(self) -> bool:
        """Whether a kt-launch works on it."""
        try:
            with self.held():
                return False
        except LaunchError:
            return True

    def done(self) -> None:
        """Record that all jobs have finished."""
        self._write(self._sweep_file, {**self.read(), "done": True, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def read(self) -> dict[str, Any]:
        """sweep.json, or {} if it is not valid."""
        found = read_json_or_empty(self._sweep_file)
        command = found.get("command", ())
        return found if isinstance(command, list) and all(isinstance(word, str) for word in command) else {}

    def stop(self) -> None:
        """Start no further job, on this host or another."""
        self._stop_file.touch()

    @property
    def stopped(self) -> bool:
        return self._stop_file.exists()

    def row(self, overrides: Iterable[str]) -> Row | None:
        """The row of a finished job, or None."""
        found = [row for file in self._files(overrides) if (row := _read_row(file))]
        return found[0] if found else None

    def write_row(self, row: Row, replace: bool = True) -> None:
        """Store a row, unless its job did not finish. replace: remove earlier rows of the same job."""
        if row["state"] in (INTERRUPTED, SKIPPED):
            return
        earlier = self._files(row["overrides"]) if replace else []
        file = self.path / "rows" / f"{row['number']:04}-{row_key(row['overrides'])}.json"
        self._write(file, row)
        for other in earlier:
            if other != file:
                other.unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """All rows, in the order of their jobs."""
        found = [row for file in (self.path / "rows").glob("*.json") if (row := _read_row(file))]
        return sorted(found, key=lambda row: (row.get("number") or 0, row.get("began") or ""))

    def _files(self, overrides: Iterable[str]) -> list[Path]:
        return sorted((self.path / "rows").glob(f"*-{row_key(overrides)}.json"))

    def _write(self, file: Path, content: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def _read_row(file: Path) -> Row | None:
    """None for a file that is empty, or has just been removed. Raises LaunchError for what no sweep has written."""
    content = read_json_or_empty(file)
    if not content:
        return None
    try:
        _kept_row().validate_python(content)
    except ValidationError as failure:
        problem = f"{file} is not a row of a sweep ({first_mistake(failure)})"
        raise LaunchError("sweep.folder", problem, "Remove it, and its job runs again.") from failure
    return Row(content)


@functools.cache
def _kept_row() -> TypeAdapter[Any]:
    """The parts of a row that reports rely on; a row has more."""

    class Load(TypedDict):
        target: str
        output_tokens_per_s: float

    class Kept(TypedDict):
        number: int
        overrides: list[str]
        state: str
        exit_code: int
        action: NotRequired[str | None]
        error: NotRequired[str | None]
        began: NotRequired[str | None]
        objective: NotRequired[float | None]
        objective_name: NotRequired[str | None]
        loads: NotRequired[list[Load] | None]
        quality: NotRequired[list[dict[str, Any]] | None]
        resolved: NotRequired[dict[str, Any] | None]
        summary: NotRequired[dict[str, Any] | None]
        memory: NotRequired[dict[str, Any] | None]
        start: NotRequired[dict[str, Any] | None]

    return TypeAdapter(Kept)


def row_key(overrides: Iterable[str]) -> str:
    """Short hash of a job's overrides."""
    asked = sorted(asked_of(overrides))
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def asked_of(overrides: Iterable[str]) -> list[str]:
    """The overrides that define the job, without those that say how the sweep is run."""
    return [override for override in overrides if not override.lstrip("+~").startswith(NOT_ASKED)]


def sweeps_root(runs: Path) -> Path:
    """The folder for sweeps, next to their runs."""
    return runs / "sweeps"


def choose_folder(root: Path, command: Sequence[str], resume: bool, retry: bool) -> SweepFolder:
    """The newest sweep of the same command if it was not finished and nobody works on it; else a new one."""
    asked = sorted(asked_of(command))
    if resume:
        for path in sorted(root.glob("*/sweep.json"), reverse=True):
            earlier = SweepFolder(path.parent)
            record = earlier.read()
            if sorted(asked_of(record.get("command", []))) == asked:
                unfinished = not record.get("done") or (retry and any(row["state"] != OK for row in earlier.rows()))
                if unfinished and not earlier.is_held:
                    return earlier
                break
    stem = time.strftime("%Y%m%d-%H%M%S")
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return SweepFolder(next(root / name for name in names if not (root / name).exists()))


def state_of(exit_code: int) -> str:
    """The state of a job that was not isolated, from its exit code."""
    if exit_code == EXIT_INTERRUPTED:
        return INTERRUPTED
    return FAILED if exit_code else OK
