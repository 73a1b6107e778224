"""Rotary embeddings without scaling in DeepSeek's attention (Moonlight is such a model).

Trigger: on a CPU SGLang makes MLA's rotary embedding with a factory that knows YaRN only and ends in an assertion for a
model whose config.json has no rope_scaling. Safe because SGLang's general factory makes the embedding that the same
model gets on a GPU, and its PyTorch form takes positions, queries and keys as MLA on torch_native gives them. Remove
when layers/rotary_embedding/factory.py serves rope_scaling=None on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_get_rope_cpu(
    original: Callable[..., Any],
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: float,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    *arguments: Any,
    **options: Any,
) -> Any:
    """AROUND hook of `rotary_embedding.factory.get_rope_cpu`."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    if rope_scaling is None:
        return get_rope(head_size, rotary_dim, max_position, base, is_neox_style)
    return original(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, *arguments, **options)
