"""Runs a float32 model with the rounding of bfloat16: the reference error of agreement.py. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

SEGMENT, STEPS = 1024, 127
"""A row multiplied with quantized weights has one scale for each SEGMENT of it at most, and STEPS levels either side of
zero, as in kernels/gemm.h."""


class Rounded(TorchFunctionMode):  # type: ignore[misc]
    """While active, the results of modules and of matrix products are rounded to bfloat16. Rotary embeddings keep their
    angles, which every implementation has in float32. integer_rows: rows multiplied with expert weights are quantized
    to eight bits."""

    def __init__(self, model: Any, *, integer_rows: bool = False) -> None:
        super().__init__()
        self._model = model
        self._integer_rows = integer_rows
        self._inside_experts = False
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for _, module in self._model.named_modules():
            if hasattr(module, "inv_freq"):
                continue
            if isinstance(getattr(module, "gate_up_proj", None), torch.Tensor):
                self._hooks.append(module.register_forward_pre_hook(partial(self._enter_experts, True)))
                self._hooks.append(module.register_forward_hook(partial(self._enter_experts, False)))
            self._hooks.append(module.register_forward_hook(_round_result))
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.nn.functional.linear:
            return function(*args, **(kwargs or {}))
        if self._inside_experts and self._integer_rows:
            args = (integer_rows(args[0]), *args[1:])
        return bfloat16(function(*args, **(kwargs or {})))

    def _enter_experts(self, inside: bool, *_: Any) -> None:
        self._inside_experts = inside


def _round_result(module: Any, inputs: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(bfloat16(one) for one in result)
    return bfloat16(result)


def bfloat16(value: Any) -> Any:
    """Rounded, in its own type; anything but a floating-point tensor is returned unchanged."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.bfloat16).to(value.dtype)


def integer_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """Rows quantized as the kernels do it."""
    parts = x_TK.tensor_split(-(-x_TK.shape[-1] // SEGMENT), dim=-1)
    steps = [part.abs().amax(-1, keepdim=True).clamp(min=1e-30) / STEPS for part in parts]
    return torch.cat([(part / step).round() * step for part, step in zip(parts, steps, strict=True)], dim=-1)
