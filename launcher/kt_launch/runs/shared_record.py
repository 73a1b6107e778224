"""What a start has in /dev/shm: a record there, locked by its launcher while that lives.

The record's name and those of the server's files contain the number of the start; it lists what goes with them and has
other names. It lies beside them, so that any later start finds it, whatever its TMPDIR, and it is gone when they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from kt_launch.machine.processes import any_process_has
from kt_launch.machine.shared_memory import SHARED, remove_shared, shared_files, shared_files_in_use, shared_files_of
from kt_model.atomic_file import held_file
from kt_model.contract import START

PREFIX = "kt-launch-"
NUMBER = re.compile(r"[0-9a-f]{32}")
MOST_BYTES = 1 << 20
"""Of a record that is read."""


class SharedRecord:
    """The record of a start, from before its server exists until after it has ended; then all that it had in /dev/shm
    is removed. Files that were there before, or that other processes use, are not its own.

    If /dev/shm cannot be written, only this process knows what is not named after the start.
    """

    def __init__(self, start: str) -> None:
        self._start = start
        self._lines: BinaryIO | None = None
        self._shared: set[Path] = set()

    def __enter__(self) -> SharedRecord:
        self._before = set(_listed())
        with contextlib.suppress(OSError):
            self._lines = held_file(_record(self._start), 0o600)
        return self

    def note_folder(self, folder: Path) -> None:
        """A folder for temporary files that a later start is to remove; see noted_folders."""
        self._write([folder])

    def look(self, pids: Iterable[int]) -> None:
        """Note what these processes of the server use."""
        new = {path for path in shared_files(pids) if self._start not in path.name} - self._before - self._shared
        self._shared |= new
        self._write(new)

    def __exit__(self, *_: object) -> None:
        _remove(self._start, self._shared)
        if self._lines:
            self._lines.close()

    def _write(self, paths: Iterable[Path]) -> None:
        with contextlib.suppress(OSError):
            if self._lines and (lines := "".join(f"{path}\n" for path in paths)):
                self._lines.write(os.fsencode(lines))
                self._lines.flush()


def is_alive(start: str) -> bool:
    """Whether a process of that start is alive. SGLang's processes may have overwritten their environment with a title;
    they are recognized by what they use."""
    return any_process_has(START, start) or bool(shared_files_in_use() & named_after(start))


def named_after(start: str) -> set[Path]:
    """Files in /dev/shm; without the record, which who looks has open."""
    return shared_files_of(start) - {_record(start)}


def remove_abandoned_shared() -> None:
    """Remove what starts of this user have in /dev/shm whose launcher was killed and whose server has ended.

    Containers that share /dev/shm see each other's locks, but not each other's processes: there, the lock alone
    decides. It is free once the launcher was killed, and the server is killed with it (kt_sglang/server.py).
    """
    for start in _recorded():
        with contextlib.suppress(OSError), _record_of_the_dead(start) as lines:
            if not is_alive(start):
                _remove(start, {path for path in _paths(lines) if path.parent == SHARED})


def noted_folders() -> set[Path]:
    """Folders in this user's records; whether they are abandoned is for their owner file to say."""
    found: set[Path] = set()
    for start in _recorded():
        with contextlib.suppress(OSError), _record_of_the_dead(start) as lines:
            found |= {path for path in _paths(lines) if path.parent != SHARED and path.name.startswith(PREFIX)}
    return found


def _remove(start: str, shared: set[Path]) -> None:
    remove_shared(shared - (shared_files_in_use() if shared else set()))
    remove_shared(named_after(start))
    remove_shared([_record(start)])


def _record(start: str) -> Path:
    return SHARED / f"{PREFIX}{start}"


def _listed() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from SHARED.iterdir()


def _recorded() -> list[str]:
    """Numbers of starts. Only one of our own form is accepted, since it becomes part of a path."""
    names = (path.name.removeprefix(PREFIX) for path in _listed() if path.name.startswith(PREFIX))
    return [name for name in names if NUMBER.fullmatch(name)]


@contextlib.contextmanager
def _record_of_the_dead(start: str) -> Iterator[BinaryIO]:
    """The record of a launcher that is gone. Its lock is shared, so that of two that look at once none is taken for
    the launcher. Raises OSError if there is no such record of this user, or its launcher lives."""
    handle = os.open(_record(start), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{_record(start)} is no record of this user")
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield file


def _paths(lines: BinaryIO) -> list[Path]:
    return [Path(os.fsdecode(line)) for line in lines.read(MOST_BYTES).splitlines()]
