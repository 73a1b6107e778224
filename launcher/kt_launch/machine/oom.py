"""The kernel's own evidence that it killed processes for lack of memory: its counters, and its log if readable."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from kt_launch.machine.kernel import cgroup_places, find, log_lines, read_text

KILLED = re.compile(r"(?:Out of memory|Memory cgroup out of memory): Killed process (\d+)")


class MemoryKills:
    """Counts the processes that the kernel has killed for lack of memory since this object was made."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before_here, self._before_anywhere = self._count_here(), self._count_anywhere()

    def since(self, pids: Iterable[int] = ()) -> str:
        """One line of evidence, or ''. pids: the server's processes, looked for in the kernel's log."""
        for line in log_lines():
            found = KILLED.search(line)
            if found and int(found[1]) in set(pids):
                return f"kernel: {line.strip()}"
        count = self._count_here() - self._before_here
        return f"oom_kill counted {count} in the cgroup's memory.events" if count > 0 else ""

    @property
    def any_since(self) -> bool:
        """Whether the kernel killed any process, of this cgroup or elsewhere on the machine."""
        return self._count_here() > self._before_here or self._count_anywhere() > self._before_anywhere

    def _count_anywhere(self) -> int:
        return _oom_kills(self._root / "proc/vmstat")

    def _count_here(self) -> int:
        """In this process's cgroup, or at the mount itself if a container shows that. Parent cgroups would count
        others' kills."""
        names = ("memory.oom_control", "memory.events")
        places = cgroup_places(self._root, "memory")
        files = (folder / names[new] for mount, group, new in places for folder in (mount, mount / group))
        return max((_oom_kills(file) for file in files), default=0)


def _oom_kills(file: Path) -> int:
    return int(find(r"^oom_kill (\d+)$", read_text(file)) or 0)
