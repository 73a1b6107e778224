"""`python -P -m kt_sglang.bench_client …`: SGLang's own serving benchmark, with stand-ins for what it imports but text
does not use.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

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
    """SGLang's benchmark, as `python -m` runs it."""
    from kt_sglang.without_gpu import torchvision_shim

    _stand_in_for_datasets()
    torchvision_shim.install_if_needed()
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
