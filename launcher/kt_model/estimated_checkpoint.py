"""A checkpoint estimated from its config.json alone, before its weights are downloaded: sizes are computed from shapes,
whereas checkpoint.py reads headers. Norms and biases, about a thousandth of the total, are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_model.checkpoint import Checkpoint, facts_of
from kt_model.families import Family
from kt_model.modelconfig import read_model_config

BF16_BYTES = 2


@dataclass(frozen=True)
class EstimatedCheckpoint(Checkpoint):
    """The facts of a checkpoint that is not on this machine; sizes are those of bfloat16."""

    @functools.cached_property
    def other_bytes(self) -> int:
        """Bytes of everything that is served except routed experts."""
        layers, dense = self.num_layers, self.num_layers - len(self.moe_layers)
        values = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        values += layers * attention_values(self.family, self.config)
        values += dense * 3 * self.hidden_size * int(self.config.get("intermediate_size") or 0)
        values += len(self.moe_layers) * (self.num_experts * self.hidden_size + shared_values(self))
        return values * BF16_BYTES

    @functools.cached_property
    def latent_projection_bytes(self) -> int:
        """Bytes of MLA's kv_b_proj."""
        return self.num_layers * latent_values(self.family, self.config) * BF16_BYTES


def estimate_checkpoint(file: Path, where: str) -> EstimatedCheckpoint:
    """The estimate for a config.json. Raises LaunchError."""
    config, family = read_model_config(file, where)
    return EstimatedCheckpoint(path=file.parent, expert_dtype="BF16", located={}, **facts_of(config, family, file))


def shared_values(base: Checkpoint) -> int:
    """Weights of a layer's shared experts, with Qwen2-MoE's gate of its shared expert."""
    if base.family.shared_width_key:
        width = int(base.config.get(base.family.shared_width_key) or 0)
        return 3 * base.hidden_size * width + (base.hidden_size if width else 0)
    return 3 * base.hidden_size * base.moe_intermediate_size * base.shared_experts


def attention_values(family: Family, config: Mapping[str, Any]) -> int:
    """Weights of one layer's attention."""
    hidden, heads = int(config["hidden_size"]), int(config.get("num_attention_heads") or 1)
    if family.latent_cache and config.get("kv_lora_rank"):
        return _latent_attention(config, hidden, heads) + latent_values(family, config)
    width = int(config.get("head_dim") or hidden // heads)
    return 2 * hidden * width * (heads + int(config.get("num_key_value_heads") or heads))


def _latent_attention(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """MLA without kv_b_proj: queries (through a low rank if there is one), the latent vector, and the output."""
    latent, rotary = int(config["kv_lora_rank"]), int(config.get("qk_rope_head_dim") or 0)
    query, low = heads * (int(config.get("qk_nope_head_dim") or 0) + rotary), int(config.get("q_lora_rank") or 0)
    queries = low * (hidden + query) if low else hidden * query
    return queries + hidden * (latent + rotary) + heads * int(config.get("v_head_dim") or 0) * hidden


def latent_values(family: Family, config: Mapping[str, Any]) -> int:
    """Weights of one layer's kv_b_proj; 0 without MLA."""
    if not family.latent_cache or not config.get("kv_lora_rank"):
        return 0
    per_head = int(config.get("qk_nope_head_dim") or 0) + int(config.get("v_head_dim") or 0)
    return int(config["kv_lora_rank"]) * int(config.get("num_attention_heads") or 1) * per_head
