"""Pinned host memory where there is no accelerator to pin it for.

Trigger: SGLang's LoRA code allocates with pin_memory=True unconditionally (lora/layers.py and
lora/backend/torch_backend.py); torch raises without an accelerator. Safe because pinning changes only how fast a copy
to a device is, and there is no device. Only those modules see the changed factories. Remove when SGLang asks
`is_pin_memory_available` there, as it does in lora/mem_pool.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

MODULES = ("sglang.srt.lora.layers", "sglang.srt.lora.lora", "sglang.srt.lora.backend.torch_backend")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "ones_like", "zeros_like")


class _UnpinnedTorch(ModuleType):
    """`torch` as seen by those modules: the same, without pin_memory in tensor factories."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _without_pinning(value) if name in FACTORIES else value


def install() -> None:
    """Give SGLang's LoRA modules the unpinned factories, and make `Tensor.pin_memory` return the tensor itself."""
    torch.Tensor.pin_memory = _keep
    for name in MODULES:
        module = importlib.import_module(name)
        module.torch = _UnpinnedTorch("torch")  # type: ignore[attr-defined]


def _keep(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _without_pinning(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make
