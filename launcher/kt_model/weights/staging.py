"""A staged folder: filled under a temporary name, resumed after a kill or a full disk, and renamed only when complete.
If its source turns out to be wrong, nothing of it remains.

One process makes it; another that wants the same waits, and then finds it made.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kt_model.atomic_file import DiskError, disk_errors
from kt_model.errors import LaunchError
from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.printable import say

if TYPE_CHECKING:
    from filelock import FileLock

STATE = "state.json"


class StagedFolder:
    """Used as a context manager, which holds the lock. key: what it is made from; leftovers with another key are
    removed."""

    def __init__(self, target: Path, key: Mapping[str, Any], manifest: str) -> None:
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self._key = json.loads(json.dumps(key))
        self._manifest = manifest
        self.pieces: dict[str, Any] = {}

    def __enter__(self) -> StagedFolder:
        from filelock import FileLock, Timeout

        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            file = _lock_file(self.target)
            file.touch()  # filelock would treat an unwritable folder as locked
            self._lock = FileLock(file)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                say(f"waiting: another process is writing {self.target}", file=sys.stderr)
                self._lock.acquire()
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, LaunchError) and not isinstance(error, DiskError):
                shutil.rmtree(self.partial, ignore_errors=True)
        finally:
            self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether it already exists, made from the same source."""
        return self.target.is_dir()

    def _begin(self) -> None:
        if self.target.exists():
            self._check_target()
            return
        with disk_errors(self.partial):
            self.partial.mkdir(exist_ok=True)
            state = read_json_or_empty(self.partial / STATE)
            if state.get("key") != self._key:
                shutil.rmtree(self.partial)
                self.partial.mkdir()
                state = {}
        for draft in self.partial.glob("*.tmp"):  # left by a killed process, since this one holds the lock
            draft.unlink()
        pieces = state.get("pieces")
        pieces = pieces.items() if isinstance(pieces, dict) else ()
        self.pieces = {name: facts for name, facts in pieces if self._is_there(name, facts)}

    def _check_target(self) -> None:
        made = read_json_or_empty(self.target / self._manifest)
        if made.get("key") != self._key:
            what = "was made from something else" if made else "was not made by kt-launch"
            raise LaunchError(str(self.target), f"exists and {what}", "Choose another folder, or remove this one.")

    def _is_there(self, name: str, facts: Any) -> bool:
        file = self.partial / name
        return isinstance(facts, dict) and file.is_file() and file.stat().st_size == facts.get("bytes")

    def done(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that one of its files is complete; facts has at least its bytes and sha256."""
        self.pieces[name] = dict(facts)
        with disk_errors(self.partial / STATE):
            write_json(self.partial / STATE, {"key": self._key, "pieces": self.pieces})

    def finish(self, content: Mapping[str, Any]) -> None:
        """Write the manifest and give the folder its name."""
        with disk_errors(self.target):
            write_json(
                self.partial / self._manifest,
                {"key": self._key, **content, "shards": dict(sorted(self.pieces.items()))},
            )
            (self.partial / STATE).unlink(missing_ok=True)
            self.partial.rename(self.target)


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def is_being_written(target: Path) -> bool:
    """Whether a process holds its lock now."""
    lock = _hold(target)
    if lock is not None:
        lock.release()
    return lock is None


def remove_all_of(target: Path) -> bool:
    """Remove the folder, its unfinished parts and its lock; False if a process is making it now."""
    lock = _hold(target)
    if lock is None:
        return False
    try:
        for folder in (target, target.with_name(f"{target.name}.partial")):
            if folder.exists():
                with disk_errors(folder):
                    shutil.rmtree(folder)
        _lock_file(target).unlink(missing_ok=True)
    finally:
        lock.release()
    return True


def _hold(target: Path) -> FileLock | None:
    """Its lock, or None if another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_file(target))
    with disk_errors(target):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
    return lock
