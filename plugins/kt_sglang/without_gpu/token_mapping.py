"""Requests with the same adapter that are prefilled together, under the torch_native LoRA backend.

Trigger: torch_native merges neighbouring requests with the same adapter into one segment, but SGLang sizes the mapping
of tokens to adapters by the longest single request; two prompts of 130 tokens end in "MoE LoRA token-mapping launch
under-covers tokens", and the server with them. Safe because the size only bounds a kernel launch that a CPU does not
make, and a larger bound covers the same tokens. Remove when lora/backend/base_backend.py bounds by merged segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_compute_moe_lora_info(
    original: Callable[..., Any],
    num_tokens: int,
    seg_indptr: Any,
    lora_ranks: Any,
    weight_indices: Any,
    adapter_enabled: Any,
    token_lora_mapping: Any,
    max_len: int,
    **options: Any,
) -> Any:
    """AROUND hook of `lora.backend.base_backend._compute_moe_lora_info`."""
    bound = max(int(max_len), num_tokens)
    return original(
        num_tokens, seg_indptr, lora_ranks, weight_indices, adapter_enabled, token_lora_mapping, bound, **options
    )
