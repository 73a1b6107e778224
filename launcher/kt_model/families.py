"""The Mixture-of-Experts families, as data: their names in config.json and of weights. A new family is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """The names that one family uses in its config.json and its checkpoint."""

    name: str
    """As in config.json's model_type."""
    experts_key: str
    """Number of routed experts."""
    intermediate_key: str
    """Inner width of one routed expert."""
    new_experts_key: str = ""
    """The same in a config.json written by transformers 5, if it differs."""
    expert: str = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
    """Name of one routed expert's weight."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The family's names for gate, up and down."""
    renamed: tuple[str, str] = ("", "")
    """A part of hub names, and transformers 5's name for it, if it differs."""
    top_k_key: str = "num_experts_per_tok"
    first_dense_key: str = ""
    """How many layers at the start are dense."""
    step_key: str = ""
    """The step between layers with experts."""
    step_offset: int = 0
    """A layer has experts if (layer + offset) is a multiple of the step."""
    dense_layers_key: str = ""
    """The list of layers that are dense."""
    shared_key: str = ""
    """Number of shared experts."""
    shared_width_key: str = ""
    """Inner width of the shared expert, if the family gives it directly."""
    latent_cache: bool = False
    """Whether attention caches one compressed vector per token (MLA) instead of every head's keys and values."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Types of rope_scaling that SGLang computes as the model was trained. SGLang applies `dynamic` from the first
    token on, treats any scaling of MLA as YaRN, and ignores Mixtral's."""


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "n_routed_experts",
    "moe_intermediate_size",
    first_dense_key="first_k_dense_replace",
    step_key="moe_layer_freq",
    shared_key="n_shared_experts",
    latent_cache=True,
    rope_types=("default", "yarn"),
)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        DEEPSEEK_V2,
        replace(DEEPSEEK_V2, name="deepseek_v3"),
        Family(
            "glm4_moe",
            "n_routed_experts",
            "moe_intermediate_size",
            first_dense_key="first_k_dense_replace",
            shared_key="n_shared_experts",
        ),
        Family(
            "mixtral",
            "num_local_experts",
            "intermediate_size",
            expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight",
            projections=("w1", "w3", "w2"),
            renamed=(".block_sparse_moe.", ".mlp."),
            rope_types=("default",),
        ),
        Family(
            "qwen2_moe",
            "num_experts",
            "moe_intermediate_size",
            step_key="decoder_sparse_step",
            step_offset=1,
            dense_layers_key="mlp_only_layers",
            shared_width_key="shared_expert_intermediate_size",
        ),
        Family(
            "qwen3_moe",
            "num_experts",
            "moe_intermediate_size",
            new_experts_key="num_local_experts",
            step_key="decoder_sparse_step",
            step_offset=1,
            dense_layers_key="mlp_only_layers",
        ),
    )
}


def moe_layers(family: Family, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that have routed experts."""
    first = int(config.get(family.first_dense_key) or 0)
    step = int(config.get(family.step_key) or 1)
    dense = set(config.get(family.dense_layers_key) or ())
    layers = range(first, int(config["num_hidden_layers"]))
    return tuple(layer for layer in layers if (layer + family.step_offset) % step == 0 and layer not in dense)


def kv_values(family: Family, config: Mapping[str, Any]) -> int:
    """Values that attention caches per token in one layer."""
    if family.latent_cache and config.get("kv_lora_rank"):
        return int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return int(config.get("num_key_value_heads") or heads) * (width + int(config.get("v_head_dim") or width))


def value_width(family: Family, config: Mapping[str, Any]) -> int:
    """Values that attention gives per token and head: with MLA in its latent space, as backends compute it."""
    if family.latent_cache and config.get("kv_lora_rank"):
        return int(config["kv_lora_rank"])
    heads = int(config.get("num_attention_heads") or 1)
    return int(config.get("v_head_dim") or config.get("head_dim") or config["hidden_size"] // heads)


def expert_weights(family: Family, layer: int, expert: int) -> tuple[str, ...]:
    """Names of gate, up and down of one routed expert."""
    return tuple(family.expert.format(layer=layer, expert=expert, projection=name) for name in family.projections)
