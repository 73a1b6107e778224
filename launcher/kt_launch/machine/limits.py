"""Limits that the kernel sets for a user's processes: a shell's ulimit, and a cgroup's limit on processes. Decides
nothing.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kt_launch.machine.kernel import cgroup_folders, find, read_text

RAISED_FILES = 65535
"""SGLang raises its limit on open files to this, if it may."""
UID = r"^Uid:\s+(\d+)"
COUNTED_BELOW = 16384
"""Above this limit on threads it is not worth counting the user's, which takes a moment."""


@dataclass(frozen=True)
class Limits:
    """Each is None if there is no limit."""

    address_space_bytes: int | None = None
    """Of one process (ulimit -v, ulimit -d). Needs are larger than resident memory: files are mapped and stacks
    reserved."""
    threads_left: int | None = None
    """Processes that this user, or this cgroup, may still start (ulimit -u, a container's pids limit)."""
    open_files: int | None = None
    """Of one process, once SGLang has raised the limit as far as it may (ulimit -n)."""


def address_space_bytes() -> int | None:
    """Of this process, now."""
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def read_limits(root: Path = Path("/")) -> Limits:
    """For this process and those that it starts."""
    text = read_text(root / "proc/self/limits")
    sizes = [soft for soft, _ in (_row(text, "Max address space"), _row(text, "Max data size")) if soft is not None]
    soft, hard = _row(text, "Max open files")
    raised = soft is not None and soft < RAISED_FILES and (hard is None or hard >= RAISED_FILES)
    left = [*_left_to_user(root, _row(text, "Max processes")[0]), *_left_to_cgroup(root)]
    return Limits(min(sizes, default=None), min(left, default=None), RAISED_FILES if raised else soft)


def _row(limits: str, name: str) -> tuple[int | None, int | None]:
    """Soft and hard limit."""
    match = re.search(rf"^{name}\s+(\S+)\s+(\S+)", limits, re.MULTILINE)
    soft, hard = (match[1], match[2]) if match else ("", "")
    return int(soft) if soft.isdigit() else None, int(hard) if hard.isdigit() else None


def _left_to_user(root: Path, limit: int | None) -> Iterator[int]:
    """The kernel counts the user's threads on the whole machine; root is not limited."""
    user = find(UID, read_text(root / "proc/self/status"))
    if limit is None or limit >= COUNTED_BELOW or user in ("", "0"):
        return
    others = (read_text(path) for path in (root / "proc").glob("[0-9]*/status"))
    threads = (find(r"^Threads:\s+(\d+)", status) for status in others if find(UID, status) == user)
    yield max(limit - sum(int(count or 0) for count in threads), 0)


def _left_to_cgroup(root: Path) -> Iterator[int]:
    for folder, _ in cgroup_folders(root, "pids"):
        limit, now = (read_text(folder / name).strip() for name in ("pids.max", "pids.current"))
        if limit.isdigit() and now.isdigit():
            yield max(int(limit) - int(now), 0)
