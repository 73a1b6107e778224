"""Resident experts on a CPU device: expert by expert in plain torch.

Trigger: SGLang's own loop for CPUs does not support ids of -1 or adapters. Safe because it computes what the kernels of
resident.py compute, in the same order; slow, and used without a GPU only by tests.

Shapes as in resident.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu


def in_plain_torch(method: Any, layer: torch.nn.Module, dispatched: Any, hooks: Any) -> torch.Tensor:
    """Σ_k weight·expert(x); ids of -1 are computed elsewhere."""
    x_TH, (weights_TK, ids_TK, _) = dispatched.hidden_states, dispatched.topk_output
    (tokens, top_k), (_, hidden, inner) = ids_TK.shape, layer.w2_weight.shape
    gate_up = x_TH.new_zeros(tokens, top_k, 2 * inner)
    for expert, chosen in _choices(ids_TK, len(layer.w2_weight)):
        gate_up[chosen] = x_TH[chosen[0]] @ layer.w13_weight[expert].T
    if hooks:
        hooks.after_gate_up(x_TH, gate_up, weights_TK, ids_TK)
    gate, up = gate_up.chunk(2, dim=-1)
    activated = silu(gate) * up
    out = x_TH.new_zeros(tokens, top_k, hidden)
    for expert, chosen in _choices(ids_TK, len(layer.w2_weight)):
        weights = weights_TK[chosen].unsqueeze(-1)
        out[chosen] = ((activated[chosen] @ layer.w2_weight[expert].T) * weights).to(out.dtype)
    if hooks:
        hooks.after_down(activated.view(-1, inner), out, weights_TK, ids_TK)
    return out.float().sum(dim=1).to(x_TH.dtype)


def _choices(ids_TK: torch.Tensor, experts: int) -> list[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """(expert, its tokens, and which of their choices) for each expert in use."""
    found = [(expert, torch.where(ids_TK == expert)) for expert in range(experts)]
    return [(expert, (token, choice)) for expert, (token, choice) in found if len(token)]
