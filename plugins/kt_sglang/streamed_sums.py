"""The steps between and after the grouped products of streamed.py: plain torch, and on a GPU one kernel each
(streamed_kernels.py), which reads and writes everything once.

Shapes: T tokens, K top-k, P = T·K choices, H hidden size, I intermediate size.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def silu_and_mul(gate_up_PI: torch.Tensor, more_PI: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up, (P, I) in the dtype of gate_up (P, 2I), which has gate in its first columns; `more`, of the same
    shape, is added to gate_up first. In float32 and rounded once."""
    if gate_up_PI.is_cuda:
        from kt_sglang import streamed_kernels

        return streamed_kernels.silu_and_mul(gate_up_PI, more_PI)
    both = gate_up_PI.float() if more_PI is None else gate_up_PI.float() + more_PI.float()
    gate, up = both.chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up_PI.dtype)


def weighted_sum(
    out_TH: torch.Tensor, rows_PH: torch.Tensor, places_TK: torch.Tensor, weights_TK: torch.Tensor, nowhere: int
) -> None:
    """out[t] = Σ_k weights[t, k] · rows[places[t, k]], in float32 and rounded once; the first `nowhere` rows are not
    read and count as zero, whatever their weights. rows may have more columns than out."""
    if rows_PH.is_cuda:
        from kt_sglang import streamed_kernels

        return streamed_kernels.weighted_sum(out_TH, rows_PH, places_TK, weights_TK, nowhere)
    rows = rows_PH[:, : out_TH.shape[1]].float()
    rows[:nowhere] = 0
    weights = torch.where(places_TK < nowhere, 0.0, weights_TK.float())
    out_TH.copy_((rows[places_TK] * weights.unsqueeze(-1)).sum(dim=1))
    return None
