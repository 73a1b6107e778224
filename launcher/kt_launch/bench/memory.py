"""Watches the memory of a process and everything below it: the peak of what is resident, sampled once in a while.

Resident memory counts a page in every process that maps it; the proportional share (PSS), read once, does not.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import asdict, dataclass
from typing import Any

import psutil

INTERVAL_S = 0.5


@dataclass
class Memory:
    """Of all processes together, in bytes."""

    peak_rss_bytes: int = 0
    pss_bytes: int | None = None
    processes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class MemoryWatch:
    """Samples in a thread of its own between `with` and its end."""

    def __init__(self, root_pid: int) -> None:
        self._root = root_pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self.found = Memory()

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def read_shares(self) -> None:
        """Read the proportional shares now. Slow for large processes, so not while something is timed."""
        shares = []
        for process in self._processes():
            with contextlib.suppress(psutil.Error, AttributeError):
                shares.append(int(process.memory_full_info().pss))
        self.found.pss_bytes = sum(shares) if shares else None

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            sizes = []
            for process in self._processes():
                with contextlib.suppress(psutil.Error):
                    sizes.append(int(process.memory_info().rss))
            self.found.peak_rss_bytes = max(self.found.peak_rss_bytes, sum(sizes))
            self.found.processes = max(self.found.processes, len(sizes))

    def _processes(self) -> list[psutil.Process]:
        """The server's: everything below the process that started it."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._root).children(recursive=True)
        return []
