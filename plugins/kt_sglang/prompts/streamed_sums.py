"""The grouped products of streamed and resident experts, and the steps between and after them: plain torch, and on a
GPU one kernel each (streamed_kernels.py), which reads and writes everything once.

Shapes: T tokens, K top-k, P = T·K choices, G groups of rows, H hidden size, I intermediate size.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

MOST_GROUPS = 1023
"""That torch's grouped product takes at a time."""


def grouped(rows_PK: torch.Tensor, weights_GNK: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """rows @ weightsᵀ, each group's rows with its weights; ends_G int32, on the device of the rows. (P, N); rows after
    the last end may hold anything.

    torch's kernel takes at most MOST_GROUPS, and matrices whose rows start at multiples of 16 bytes, whatever lies
    between them."""
    if rows_PK.is_cuda:
        return torch._grouped_mm(rows_PK, weights_GNK.transpose(-2, -1), offs=ends_G)
    out = rows_PK.new_empty(len(rows_PK), weights_GNK.shape[1])
    begin = 0
    for group, end in enumerate(ends_G.tolist()):
        if begin < end:
            torch.mm(rows_PK[begin:end], weights_GNK[group].T, out=out[begin:end])
        begin = end
    return out


def silu_and_mul(gate_up_PI: torch.Tensor, more_PI: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) · up, (P, I) in the dtype of gate_up (P, 2I), which has gate in its first columns; `more`, of the same
    shape, is added to gate_up first. In float32 and rounded once."""
    if gate_up_PI.is_cuda:
        from kt_sglang.prompts import streamed_kernels

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
        from kt_sglang.prompts import streamed_kernels

        return streamed_kernels.weighted_sum(out_TH, rows_PH, places_TK, weights_TK, nowhere)
    rows = rows_PH[:, : out_TH.shape[1]].float()
    rows[:nowhere] = 0
    weights = torch.where(places_TK < nowhere, 0.0, weights_TK.float())
    out_TH.copy_((rows[places_TK] * weights.unsqueeze(-1)).sum(dim=1))
    return None


def add_rows(
    out_PX: torch.Tensor,
    rows_PX: torch.Tensor,
    places_P: torch.Tensor,
    ends_G: torch.Tensor,
    weights_P: torch.Tensor | None = None,
) -> None:
    """out[p] += weights[p] · rows[places[p]] in place, the product rounded as out is; weights are float32. Where
    places[p] is not before the last of `ends`, out is left alone and the row is not read. The columns of out and rows
    are contiguous."""
    if out_PX.is_cuda:
        from kt_sglang.prompts import streamed_kernels

        return streamed_kernels.add_rows(out_PX, rows_PX, places_P, ends_G, weights_P)
    here = torch.nonzero(places_P < ends_G[-1]).view(-1)
    added = rows_PX[places_P[here]]
    if weights_P is not None:
        added = added * weights_P[here].unsqueeze(-1)
    out_PX[here] += added.to(out_PX.dtype)
    return None
