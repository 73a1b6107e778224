"""One token of one MoE layer recomputed in float32 from the checkpoint on disk: the proof's independent check.

Deliberately slow and simple; shares nothing with kt_kernels but the inputs. H hidden size, I intermediate size, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kt_model.checkpoint import Checkpoint
from kt_model.families import expert_weights
from kt_model.tensors.folder import Located

PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LARGEST = torch.finfo(torch.float32).max
"""Returned if the output is not finite but the reference is."""
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""One expert's factors of an adapter, B scaled: gate A (r, H) and B (I, r), up A and B, down A (r, I) and B (H, r)."""


def relative_error(
    checkpoint: Checkpoint,
    layer: int,
    x_H: torch.Tensor,
    experts_K: Sequence[int],
    weights_K: Sequence[float],
    factors: Callable[[int], Factors] | None,
    out_H: torch.Tensor,
) -> float | None:
    """‖out − reference‖ / ‖reference‖ of one token, always finite, as JSON requires. None if the reference is zero, not
    finite itself, or has no plain weights.

    `factors` gives an adapter's factors for an expert; None means the bare base. Negative experts are skipped.
    """
    reference_H = torch.zeros_like(out_H, dtype=torch.float32)
    for expert, weight in zip(experts_K, weights_K, strict=True):
        if expert < 0:
            continue
        base = _expert(checkpoint, layer, expert)
        if base is None:
            return None
        reference_H += weight * _expert_output(x_H.float(), base, factors(expert) if factors else None)
    norm = float(reference_H.norm())
    if norm == 0 or not math.isfinite(norm):
        return None
    error = float((out_H.float() - reference_H).norm()) / norm
    return error if math.isfinite(error) else LARGEST


def _expert_output(x_H: torch.Tensor, base: Sequence[torch.Tensor], factors: Factors | None) -> torch.Tensor:
    gate, up, down = (weight.float() for weight in base)
    if factors is not None:
        gate_a, gate_b, up_a, up_b, down_a, down_b = (factor.float() for factor in factors)
        gate, up, down = gate + gate_b @ gate_a, up + up_b @ up_a, down + down_b @ down_a
    return down @ (torch.nn.functional.silu(gate @ x_H) * (up @ x_H))


def _expert(base: Checkpoint, layer: int, expert: int) -> list[torch.Tensor] | None:
    """Gate (I, H), up (I, H), down (H, I) as stored; None for stored types that need scales (FP8)."""
    places = [base.located[name] for name in expert_weights(base.family, layer, expert)]
    if any(place.file.tensors[place.stored].dtype not in PLAIN for place in places):
        return None
    return [place.cut(_whole(place)) for place in places]


def _whole(place: Located) -> torch.Tensor:
    """The stored tensor, mapped. Not by safetensors, which keeps a number for each tensor that it ever read."""
    stored = place.file.tensors[place.stored]
    start, size = place.file.data_start + stored.start, stored.end - stored.start
    pages = np.memmap(place.file.path, np.uint8, "c", start, (size,))
    return torch.from_numpy(pages).view(PLAIN[stored.dtype]).reshape(stored.shape)
