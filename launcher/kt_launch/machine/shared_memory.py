"""Shared-memory files of processes, so that none are left behind. SGLang removes its own only when it shuts down
cleanly.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

SHARED = Path("/dev/shm")


def shared_files(pids: Iterable[int], proc: Path = Path("/proc")) -> set[Path]:
    """Files below /dev/shm that these processes have mapped or open; those that are gone or may not be inspected are
    left out."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {*_mapped(proc / str(pid)), *_open(proc / str(pid))}
    return {path for path in found if path.parent == SHARED}


def shared_files_of(start: str) -> set[Path]:
    """Files whose name contains the number of this start."""
    with contextlib.suppress(OSError):
        return {path for path in SHARED.iterdir() if start and start in path.name}
    return set()


def shared_files_in_use() -> set[Path]:
    """Files below /dev/shm that any process of this user has mapped or open."""
    return shared_files(psutil.pids())


def remove_shared(files: Iterable[Path]) -> None:
    """Remove those of this user that still exist; nobody may be using them."""
    for path in files:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink()


def _mapped(process: Path) -> Iterator[Path]:
    for line in (process / "maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{SHARED}/") and not fields[5].endswith(" (deleted)"):
            yield Path(fields[5])


def _open(process: Path) -> Iterator[Path]:
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield entry.readlink()
