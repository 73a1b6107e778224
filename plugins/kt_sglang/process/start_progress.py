"""Reports a start's progress to the launcher while SGLang logs nothing: which module is being imported, and how many
experts are loaded. Log lines in the form of kt_model/contract.py, at most one per second.
"""

from __future__ import annotations

import sys
import threading
import time

from kt_model.contract import progress_line

EVERY_S = 1.0


class Imports:
    """From start() to end(), a thread reports which module the starting thread is importing. It has ended before
    processes are forked (without_gpu/forked.py)."""

    def start(self) -> None:
        self._over = threading.Event()
        self._teller = threading.Thread(target=_tell_imports, args=(self._over, threading.get_ident()), daemon=True)
        self._teller.start()

    def end(self) -> None:
        self._over.set()
        self._teller.join()


def _tell_imports(over: threading.Event, importing: int) -> None:
    while not over.wait(EVERY_S):
        module = _module_of(importing)
        if module:
            print(progress_line("import", len(sys.modules), 0, "modules", module), flush=True)


def _module_of(thread: int) -> str:
    """The innermost module that that thread is importing; '' between two."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<module>" and name not in ("__main__", __name__):
            return str(name)
        frame = frame.f_back
    return ""


class Experts:
    """How many of this process's experts are loaded; reported by the first tensor-parallel rank only."""

    def __init__(self) -> None:
        self.expected = self.loaded = 0
        self._told_at = time.monotonic()

    def expect(self, count: int) -> None:
        self.expected += count

    def add(self, count: int, rank: int) -> None:
        """Count more loaded experts."""
        self.loaded += count
        if rank == 0 and time.monotonic() - self._told_at >= EVERY_S:
            self._told_at = time.monotonic()
            print(progress_line("weights", self.loaded, self.expected, "experts"), flush=True)


IMPORTS, EXPERTS = Imports(), Experts()
