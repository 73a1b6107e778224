"""Files of shared memory that processes use, so that none is left of them. SGLang removes its own only when it ends
as it means to.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARED = Path("/dev/shm")


def shared_files(pids: Iterable[int], proc: Path = Path("/proc")) -> set[Path]:
    """Below /dev/shm, what these processes have mapped or open; what is gone, or may not be looked at, is left out."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {*_mapped(proc / str(pid)), *_open(proc / str(pid))}
    return {path for path in found if path.parent == SHARED}


def shared_files_of(start: str) -> set[Path]:
    """Those whose name bears the number of this start."""
    with contextlib.suppress(OSError):
        return {path for path in SHARED.iterdir() if start and start in path.name}
    return set()


def remove_shared(files: Iterable[Path]) -> None:
    """Remove those of this user that are still there; nobody may use them any more."""
    for path in files:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink()


def _mapped(process: Path) -> Iterator[Path]:
    for line in (process / "maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(f"{SHARED}/"):
            yield Path(fields[5].removesuffix(" (deleted)"))


def _open(process: Path) -> Iterator[Path]:
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield entry.readlink()
