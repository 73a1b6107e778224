"""Expert widths, dense widths and head counts are not padded on a CPU.

Trigger: on a CPU SGLang rounds a model's inner widths up to multiples of 32 per rank, and head counts to multiples of
the number of ranks, for AMX operators that no package on PyPI provides. Adapters and experts in kt_kernels have the
true sizes, so the first adapter on a model of width 176 ended in "LoRA buffer shape does not match", and with several
ranks, experts and adapters were split at different places. Safe because torch computes any width, and a GPU serves the
same model unpadded. Remove when configs/update_config.py pads only where those operators run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_adjust_config_with_unaligned_cpu_tp(
    original: Callable[..., Any], model_config: Any, *_: Any, **__: Any
) -> Any:
    """AROUND hook of `update_config.adjust_config_with_unaligned_cpu_tp`: the model's configuration as it is."""
    return model_config
