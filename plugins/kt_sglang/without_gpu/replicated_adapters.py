"""Adapters on replicated linear layers under the torch_native LoRA backend.

Trigger: SGLang's ReplicatedLinearWithLoRA gives the layer's output offsets but not their copy on the CPU, without which
torch_native's B step raises TypeError. Safe because on a CPU the two are the same tensor. Remove when
lora/layers.py passes output_offset_cpu there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_run_lora_b_sgemm(original: Callable[..., Any], backend: Any, *arguments: Any, **options: Any) -> Any:
    """AROUND hook of `TorchNativeLoRABackend.run_lora_b_sgemm`."""
    if "output_offset" in options:
        options.setdefault("output_offset_cpu", options["output_offset"])
    return original(backend, *arguments, **options)
