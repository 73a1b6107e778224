"""Which recorded runs are safe to start again: a run folder is data, and anybody may have made it.

Folders that others may write are refused, and so are commands that are not our server's. The interpreter is always the
current one. Of the recorded environment, only variables that tune a computation are restored, none that name a file or
a library.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path

from kt_model import contract
from kt_model.errors import LaunchError
from kt_model.plan import SERVER_COMMAND, LaunchPlan

TUNING = re.compile(
    r"TZ|LANG|LC_\w+|(?:OMP|KMP|GOMP|MKL|OPENBLAS|NUMEXPR|TOKENIZERS|HF_HUB|TRANSFORMERS|SGLANG|SGL)_\w+|"
    r"TORCHDYNAMO_DISABLE|TORCHINDUCTOR_COMPILE_THREADS|"
    r"(?:CUDA|NVIDIA)_VISIBLE_DEVICES|CUDA_DEVICE_\w+|GLOO_SOCKET_IFNAME|NCCL_(?:DEBUG|P2P|IB|SHM|SOCKET|MIN|MAX)\w*"
)
NAMES_A_FILE = re.compile(r"\w*(?:PATH|DIR|HOME|FILE|CACHE|ROOT|LIB|PLUGIN|PACKAGE|MODULE|URL|ENDPOINT|CMD|COMMAND)\w*")
FILES = ("plan.json", "lock.json")


def comes_back(variable: str) -> bool:
    """Whether a recorded variable is set again."""
    return TUNING.fullmatch(variable) is not None and NAMES_A_FILE.fullmatch(variable) is None


def require_own(folder: Path) -> None:
    """Raise LaunchError if another user owns or may write the folder, or a file that is read from it."""
    for path in (folder, *(folder / name for name in FILES if (folder / name).exists())):
        found = path.stat()
        if found.st_uid != os.geteuid():
            problem, fix = f"{path} belongs to another user", "Start a run of your own with what it shows."
            raise LaunchError("run", problem, fix)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problem, fix = f"others than you may write {path}", f"Look at what it holds, then chmod go-w {path}."
            raise LaunchError("run", problem, fix)


def trusted(plan: LaunchPlan) -> LaunchPlan:
    """The plan with the current interpreter. Raises LaunchError if it would start anything but our server."""
    if plan.argv[1 : 1 + len(SERVER_COMMAND)] != SERVER_COMMAND:
        problem = f"its command is not a kt-launch server: {' '.join(plan.argv[:4])}"
        raise LaunchError("run", problem, "Choose another run.")
    if odd := sorted(name for name in plan.env if name not in contract.PLAN_VARIABLES and not comes_back(name)):
        problem = f"its plan sets {', '.join(odd)}, which kt-launch never does"
        raise LaunchError("run", problem, "Choose another run.")
    return replace(plan, argv=(sys.executable, *plan.argv[1:]))
