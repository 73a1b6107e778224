"""The memory that processes hold, and its peak, sampled in a thread. What a plan estimated of it is peak_memory.py."""

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
    """Memory held by several processes together; a page that several of them map counts once for each."""

    kept_bytes: int = 0
    """Anonymous and shared pages, which the kernel cannot drop."""
    resident_bytes: int = 0
    """With pages of mapped files, such as a checkpoint's, which it can."""
    processes: int = 0

    def or_more(self, other: Held) -> Held:
        """Field by field, the larger of the two."""
        return Held(
            max(self.kept_bytes, other.kept_bytes),
            max(self.resident_bytes, other.resident_bytes),
            max(self.processes, other.processes),
        )


def read_held(pids: Iterable[int], root: Path = Path("/")) -> Held:
    """What these processes hold now; a process that has ended holds nothing."""
    found = [dict(RESIDENT.findall(read_text(root / f"proc/{pid}/status"))) for pid in pids]
    sizes = [{kind: int(kilobytes) * 1024 for kind, kilobytes in kinds.items()} for kinds in found if kinds]
    resident = sum(sum(kinds.values()) for kinds in sizes)
    return Held(resident - sum(kinds.get("File", 0) for kinds in sizes), resident, len(sizes))


def read_shares(pids: Iterable[int]) -> int | None:
    """Bytes resident now, a page that several processes map counted once (PSS); None where that is not told. Slow for
    large processes, so not while something is timed."""
    import psutil

    shares = []
    for pid in pids:
        with contextlib.suppress(psutil.Error, AttributeError):
            shares.append(int(psutil.Process(pid).memory_full_info().pss))
    return sum(shares) if shares else None


class MemorySampler:
    """Looks at processes between `with` and its end; `pids` says each time which ones."""

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
