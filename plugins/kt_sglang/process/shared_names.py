"""Names in /dev/shm: each contains the number of this start, so that the launcher can remove them whichever process
died, however early.

Trigger: SGLang and multiprocessing generate names, and remove them only on a clean exit; a process that is killed right
after creating one leaves it, under a name that nobody knows. Safe because such names are only used to open the object.
NCCL's short-lived names have no number. Remove when SGLang always removes its own.
"""

from __future__ import annotations

import multiprocessing.process
import os
from collections.abc import Callable
from typing import Any

from kt_model.contract import START


def number() -> str:
    """The prefix of this start's names; '' without a launcher."""
    return os.environ.get(START, "")


def name_semaphores() -> None:
    """Names of this process and of all its descendants, which exist until they end."""
    if own := number():
        multiprocessing.process.current_process()._config["semprefix"] = f"/mp-{own}"  # type: ignore[attr-defined]


def after_init_new(ports: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `PortArgs.init_new`: names the file in which schedulers report their load."""
    if own := number():
        ports.instance_id = own
    return ports


def around_make_shm_name(original: Callable[[str], str], kind: str) -> str:
    """AROUND hook of `make_shm_name`: broadcast buffers. The pid stays where SGLang expects it."""
    own = number()
    return original(f"{kind}_{own}" if own else kind)
