"""Schedulers and the detokenizer are forked from the main process, which has already imported SGLang.

Trigger: SGLang spawns them, because CUDA does not survive a fork; each then imports torch and SGLang again, which takes
half of a start on two cores and 150 MB more memory each. Safe because there is no CUDA here, and because nothing is
forked unless the main thread is the only one, so that no lock is held by a thread that the child lacks. A child
inherits neither the start method (a data-parallel controller has threads when it starts its schedulers) nor the main
process's SIGQUIT handler. Remove when SGLang has a start method for CPUs, or imports in a tenth of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

TASKS = Path("/proc/self/task")
"""The threads of this process."""


def after_set_envs_and_config(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `engine._set_envs_and_config`, which sets the start method and is called once."""
    if is_alone():
        multiprocessing.set_start_method("fork", force=True)
        os.register_at_fork(after_in_child=_begin_as_spawned)
    return result


def is_alone() -> bool:
    """Whether the calling thread is the only one of its process."""
    return len(list(TASKS.iterdir())) == 1


def _begin_as_spawned() -> None:
    multiprocessing.set_start_method("spawn", force=True)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
