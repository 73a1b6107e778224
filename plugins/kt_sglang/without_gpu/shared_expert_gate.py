"""The gate of Qwen2-MoE's shared expert.

Trigger: SGLang weighs the shared expert in a Triton kernel, also where there is no GPU, and the first forward ends in
"0 active drivers". Safe because it is the same sum, in float32 and into the same output. Remove when
models/qwen2_moe.py has a path for CPUs other than the operators for AMX.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def around_fused_gate_sigmoid_mul_add(
    original: Callable[..., Any],
    x_TH: torch.Tensor,
    gate_H: torch.Tensor,
    shared_TH: torch.Tensor,
    out_TH: torch.Tensor,
) -> None:
    """AROUND hook of `elementwise.fused_gate_sigmoid_mul_add`: out += sigmoid(x·gate) · shared, in place."""
    weight_T = torch.sigmoid(x_TH.float() @ gate_H.float())
    out_TH.copy_(out_TH.float() + weight_T[:, None] * shared_TH.float())
