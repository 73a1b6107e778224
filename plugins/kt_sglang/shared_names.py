"""Names in /dev/shm: each bears the number of this start, so that the launcher can remove what is called so, whoever
died and however early.

Trigger: SGLang and multiprocessing make names up, and remove them only when they end as they mean to; a process that is
killed right after it made one leaves it, and nobody knows of it. Safe because nobody reads such a name for anything but
to open it. What NCCL makes for a moment bears no number. Remove when SGLang removes its own, however it ends.
"""

from __future__ import annotations

import multiprocessing.process
import os
from collections.abc import Callable
from typing import Any

from kt_model.contract import START


def number() -> str:
    """Of this start; '' where there is no launcher."""
    return os.environ.get(START, "")


def name_semaphores() -> None:
    """Those of this process and of all that it starts, which have them until they end."""
    if own := number():
        multiprocessing.process.current_process()._config["semprefix"] = f"/mp-{own}"  # type: ignore[attr-defined]


def after_init_new(ports: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `PortArgs.init_new`: the file in which schedulers tell of their load is called by this."""
    if own := number():
        ports.instance_id = own
    return ports


def around_make_shm_name(original: Callable[[str], str], kind: str) -> str:
    """AROUND hook of `make_shm_name`: buffers of broadcasts. The process's number stays where SGLang looks for it."""
    own = number()
    return original(f"{kind}_{own}" if own else kind)
