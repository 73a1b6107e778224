"""`python -P -m kt_sglang.bench_client`: SGLang's own serving benchmark, run once for each line on stdin, with
stand-ins for imports that text does not use.

A line is JSON, {"arguments": ["--backend", …], "log": "/path"}; the exit code is returned as a line on stdout. Each run
is a fork of this process, which has imported the benchmark already: on two cores, the import takes longer than a short
load.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from kt_model.gc_pause import gc_paused
from kt_model.parent_death import die_with_parent

COMMAND = "sglang.benchmark.serving"


def _stand_in_for_datasets() -> None:
    """SGLang's benchmark imports Hugging Face's `datasets` for an image dataset that is not used here.

    Only where it is not installed (as in the minimal set for machines without a GPU). Remove when SGLang imports it in
    the function that needs it.
    """
    if find_spec("datasets") is None:
        module = ModuleType("datasets")
        module.__spec__ = ModuleSpec("datasets", None)
        module.load_dataset = None  # type: ignore[attr-defined]
        sys.modules["datasets"] = module


def main() -> None:
    """Import the benchmark, then run it for each line."""
    from kt_sglang.without_gpu import torchvision_shim

    _stand_in_for_datasets()
    with gc_paused():
        torchvision_shim.install_if_needed()
        importlib.import_module(COMMAND)
    del sys.modules[COMMAND]  # it is run as __main__; what it imports stays
    for line in sys.stdin:
        print(_run_forked(**json.loads(line)), flush=True)


def _run_forked(arguments: list[str], log: str) -> int:
    parent = os.getpid()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        die_with_parent(parent)
        with Path(log).open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        code = _run(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    """SGLang's benchmark, as `python -m` runs it."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
