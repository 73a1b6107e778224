"""Adapters on MLA's kv_b_proj, which absorbed attention never calls: their part is added to what it computes instead.

Trigger: SGLang adds it with Triton kernels, which do not run on a CPU. Safe because it is the same sum per token and
head, kv_b = B·A split into the rows of K and V. Remove when SGLang's torch_native backend has the correction
(lora/deepseek_mla_correction.py).

Shapes: T tokens, N heads, K nope size, V value size, C latent size, R rank, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def around_apply_q_correction(
    original: Callable[..., Any], attention: Any, q_nope_TNK: torch.Tensor, out_TNC: torch.Tensor
) -> torch.Tensor:
    """out + scale · (q · B_k) · A for the rows of each adapter."""
    out_TNC = out_TNC.clone()
    for rows, a_RC, b_NXR, scale in _segments(attention):
        z_TNR = torch.einsum("tnk,nkr->tnr", q_nope_TNK[rows].float(), b_NXR[:, : attention.qk_nope_head_dim])
        out_TNC[rows] += (scale * (z_TNR @ a_RC)).to(out_TNC.dtype)
    return out_TNC


def around_apply_v_correction(
    original: Callable[..., Any], attention: Any, latent_TNC: torch.Tensor, out_TNV: torch.Tensor
) -> torch.Tensor:
    """out + scale · (latent · Aᵀ) · B_vᵀ for the rows of each adapter; out is flat over heads."""
    out = out_TNV.clone().view(-1, attention.num_local_heads, attention.v_head_dim)
    for rows, a_RC, b_NXR, scale in _segments(attention):
        z_TNR = latent_TNC[rows].float() @ a_RC.T
        out[rows] += (scale * torch.einsum("tnr,nvr->tnv", z_TNR, b_NXR[:, attention.qk_nope_head_dim :])).to(out.dtype)
    return out.view_as(out_TNV)


def _segments(attention: Any) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, float]]:
    """Rows of the batch that have an adapter on kv_b_proj, with its A, its B by head, and its scale."""
    layer = attention.kv_b_proj
    batch = layer.lora_backend.batch_info
    if batch is None or not hasattr(layer, "A_buffer"):
        return
    start = 0
    for slot, length in zip(batch.weight_indices_cpu.tolist(), batch.seg_lens_cpu.tolist(), strict=True):
        rows, start = slice(start, start + length), start + length
        rank = int(batch.lora_ranks_cpu[slot])
        if rank:
            b_NXR = layer.B_buffer[slot, :, :rank].float().view(attention.num_local_heads, -1, rank)
            yield rows, layer.A_buffer[slot, :rank].float(), b_NXR, float(batch.scalings_cpu[slot])
