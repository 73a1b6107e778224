"""The kernel's own evidence that it killed processes for lack of memory: its counters, and its log if readable."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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

    @property
    def excluded(self) -> bool:
        """Whether a counter that can be read says that the kernel has killed no process for lack of memory."""
        return any(_counts(file) for file in (self._anywhere, *self._here())) and not self.any_since

    def _count_anywhere(self) -> int:
        return _oom_kills(self._anywhere)

    def _count_here(self) -> int:
        return max((_oom_kills(file) for file in self._here()), default=0)

    @property
    def _anywhere(self) -> Path:
        return self._root / "proc/vmstat"

    def _here(self) -> Iterator[Path]:
        """Of this process's cgroup, or at the mount itself if a container shows that. Parent cgroups would count
        others' kills."""
        names = ("memory.oom_control", "memory.events")
        for mount, group, new in cgroup_places(self._root, "memory"):
            yield from (folder / names[new] for folder in (mount, mount / group))


def _oom_kills(file: Path) -> int:
    return int(_counts(file) or 0)


def _counts(file: Path) -> str:
    """The number as it is written; '' if the file has none."""
    return find(r"^oom_kill (\d+)$", read_text(file))
