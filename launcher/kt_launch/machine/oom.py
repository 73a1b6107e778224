"""The kernel's own evidence that it ended processes for want of memory: cgroup counters, and its log where readable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

KILLED = re.compile(r"(?:Out of memory|Memory cgroup out of memory): Killed process (\d+)")


class MemoryKills:
    """Counts from its creation on."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = self._count()

    def since(self, pids: Iterable[int] = ()) -> str:
        """One line of evidence, or ''. `pids` are the server's processes, sought in the kernel's log."""
        for line in _kernel_lines():
            found = KILLED.search(line)
            if found and int(found[1]) in set(pids):
                return f"kernel: {line.strip()}"
        count = self._count() - self._before
        return f"oom_kill counted {count} in the cgroup's memory.events" if count > 0 else ""

    def _count(self) -> int:
        return max((_oom_kills(file) for file in self._files()), default=0)

    def _files(self) -> Iterable[Path]:
        """Of this process's cgroup: version 2's memory.events, version 1's memory.oom_control."""
        for line in _read(self._root / "proc/self/cgroup").splitlines():
            _, controllers, group = line.split(":", 2)
            mount = self._root / "sys/fs/cgroup"
            if controllers == "":
                yield from (mount / group.strip("/") / "memory.events", mount / "memory.events")
            elif "memory" in controllers.split(","):
                mount /= "memory"
                yield from (mount / group.strip("/") / "memory.oom_control", mount / "memory.oom_control")


def _oom_kills(file: Path) -> int:
    found = re.search(r"^oom_kill (\d+)$", _read(file), re.MULTILINE)
    return int(found[1]) if found else 0


def _kernel_lines() -> list[str]:
    """What the kernel's ring buffer holds, where this user may read it."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    lines = []
    try:
        while True:
            lines.append(os.read(handle, 8192).decode(errors="replace").partition(";")[2])
    except OSError:
        return lines
    finally:
        os.close(handle)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
