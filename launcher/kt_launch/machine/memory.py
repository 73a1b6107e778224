"""Memory used by processes, and its peak, sampled in a thread. The comparison with the plan's estimate is
peak_memory.py.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kt_launch.machine.kernel import read_text

SAMPLE_S = 0.5
RESIDENT = re.compile(r"^Rss(Anon|Shmem|File):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Held:
    """Memory used by several processes together; a page mapped by several of them counts once for each."""

    kept_bytes: int = 0
    """Anonymous and shared pages, which the kernel cannot drop."""
    resident_bytes: int = 0
    """Including pages of mapped files, such as a checkpoint's, which it can drop."""
    processes: int = 0

    def or_more(self, other: Held) -> Held:
        """Field by field, the larger of the two."""
        return Held(
            max(self.kept_bytes, other.kept_bytes),
            max(self.resident_bytes, other.resident_bytes),
            max(self.processes, other.processes),
        )


def read_held(pids: Iterable[int], root: Path = Path("/")) -> Held:
    """What these processes use now; a process that has ended counts 0."""
    found = [dict(RESIDENT.findall(read_text(root / f"proc/{pid}/status"))) for pid in pids]
    sizes = [{kind: int(kilobytes) * 1024 for kind, kilobytes in kinds.items()} for kinds in found if kinds]
    resident = sum(sum(kinds.values()) for kinds in sizes)
    return Held(resident - sum(kinds.get("File", 0) for kinds in sizes), resident, len(sizes))


def read_shares(pids: Iterable[int]) -> int | None:
    """Resident bytes now, with pages shared by several processes counted once (PSS); None if the kernel does not say.
    Slow for large processes, so not during a measurement."""
    import psutil

    shares = []
    for pid in pids:
        with contextlib.suppress(psutil.Error, AttributeError):
            shares.append(int(psutil.Process(pid).memory_full_info().pss))
    return sum(shares) if shares else None


class MemorySampler:
    """Samples processes inside the `with` block; `pids` is called each time for their ids."""

    def __init__(self, pids: Callable[[], Iterable[int]], root: Path = Path("/")) -> None:
        self.peak = Held()
        self._pids, self._root = pids, root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def sample(self) -> None:
        """Take one sample."""
        self.peak = self.peak.or_more(read_held(self._pids(), self._root))

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.sample()
