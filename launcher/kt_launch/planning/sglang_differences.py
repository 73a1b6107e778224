"""Models that SGLang computes differently from their config.json, mostly without a warning. A plan refuses such a
model; a row can go once SGLang computes it. The differences were found by comparing logprobs with transformers in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kt_model.checkpoint import Checkpoint
from kt_model.families import FAMILIES
from kt_model.modelconfig import is_number

MLA = ("deepseek_v2", "deepseek_v3")
QWEN = ("qwen2_moe", "qwen3_moe")
WRITES_TEXT = "ForCausalLM"
SGLANGS_OWN = ("attn_factor", "extrapolation_factor")
GROUPED = "group_limited_greedy"
DUAL_CHUNKS = "dual_chunk_attention_config"
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "n_group": 1, "scoring_func": "softmax", "topk_group": 1},
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
"""Keys of config.json for which neither SGLang nor transformers has a default, with what transformers computes without
them."""
SAME = 1e-3
"""Largest difference of an attention factor that was written down from one that is computed."""


@dataclass(frozen=True)
class Departure:
    """asks: what config.json says and SGLang ignores, in words, or nothing; instead: what SGLang does."""

    families: tuple[str, ...]
    asks: Callable[[Checkpoint], str | None]
    instead: str


def _says(key: str) -> Callable[[Checkpoint], str | None]:
    return lambda base: f"{key} is true" if base.config.get(key) else None


def _dense_layers(base: Checkpoint) -> str | None:
    dense = base.num_layers - len(base.moe_layers)
    return f"{dense} of {base.num_layers} layers are dense" if dense else None


def _head_size(base: Checkpoint) -> str | None:
    heads, size = base.config.get("num_attention_heads"), base.config.get("head_dim")
    if not heads or not size or size == base.hidden_size // heads:
        return None
    return f"head_dim is {size}"


def _activation(base: Checkpoint) -> str | None:
    named = base.config.get("hidden_act")
    return None if named in (None, "silu", "swish") else f"hidden_act is {named}"


def _yarn(base: Checkpoint) -> Mapping[str, Any]:
    """The rope_scaling of a model with YaRN, else nothing."""
    found: Mapping[str, Any] = base.config.get("rope_scaling") or base.config.get("rope_parameters") or {}
    return found if base.rope_type == "yarn" else {}


def _attention_factor(base: Checkpoint) -> str | None:
    """YaRN's factor of the attention, where it is given and is not the one that follows from the other numbers
    (transformers' modeling_rope_utils)."""
    yarn, given = _yarn(base), _yarn(base).get("attention_factor")
    if given is None:
        return None
    factor, m, m_all = (_number(yarn.get(key), 0.0) for key in ("factor", "mscale", "mscale_all_dim"))
    derived = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1.0)
    return None if abs(_number(given, math.inf) - derived) < SAME else f"rope_scaling.attention_factor is {given}"


def yarn_reach(base: Checkpoint) -> int:
    """Tokens that YaRN stretches the rotary embedding to, 0 without YaRN. Qwen publishes YaRN as an addition to
    config.json that leaves max_position_embeddings as it was."""
    original = _yarn(base).get("original_max_position_embeddings") or 0
    return int(original * (_yarn(base).get("factor") or 1)) if is_number(original) else 0


def _mscale(factor: float, by: float) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(value: Any, other: float) -> float:
    return float(value) if isinstance(value, int | float) else other


def _not_truncated(base: Checkpoint) -> str | None:
    return "rope_scaling.truncate is false" if _yarn(base).get("truncate") is False else None


def _groups_unused(base: Checkpoint) -> str | None:
    groups, method = _number(base.config.get("n_group"), 1), base.config.get("topk_method")
    return f"n_group is {groups:g} and topk_method {method}" if groups > 1 and method != GROUPED else None


def _dual_chunks(base: Checkpoint) -> str | None:
    """Qwen publishes it in config_1m.json, to be used instead of config.json for contexts of a million tokens."""
    return None if base.config.get(DUAL_CHUNKS) is None else f"{DUAL_CHUNKS} is set"


def _own_words(base: Checkpoint) -> str | None:
    """What SGLang multiplies by, and neither transformers nor the families' own code knows."""
    found = [f"rope_scaling.{key} is {_yarn(base)[key]}" for key in SGLANGS_OWN if _yarn(base).get(key, 1) != 1]
    return " and ".join(found) or None


DEPARTURES = (
    Departure(tuple(FAMILIES), _activation, "computes SiLU"),
    Departure(tuple(FAMILIES), _attention_factor, "derives it from the other numbers"),
    Departure(MLA, _not_truncated, "truncates the range of the correction"),
    Departure(tuple(FAMILIES), _own_words, "multiplies by it, which transformers does not"),
    Departure(MLA, _says("attention_bias"), "computes attention without biases"),
    Departure(("deepseek_v2",), _says("mlp_bias"), "computes dense layers and shared experts without biases"),
    Departure(QWEN, _dense_layers, "has experts in every layer"),
    Departure(("deepseek_v2",), _groups_unused, f"chooses experts by groups, as {GROUPED} means"),
    Departure(QWEN, _dual_chunks, "has no attention for it; the same model's usual config.json has not got it"),
    Departure(("mixtral", "qwen2_moe"), _head_size, "divides hidden_size by num_attention_heads"),
)


def departures(base: Checkpoint) -> Iterator[str]:
    """One sentence per difference."""
    name = base.family.name
    if base.architecture and not base.architecture.endswith(WRITES_TEXT):
        yield f"config.json says that it is a {base.architecture}, which writes no text; expected is one {WRITES_TEXT}"
    for row in DEPARTURES:
        asked = row.asks(base) if name in row.families else None
        if asked:
            yield f"{asked} in config.json, but SGLang's {name} {row.instead}"
    if base.rope_type not in base.family.rope_types:
        types = " or ".join(base.family.rope_types)
        yield (
            f"its rope_scaling is of type {base.rope_type}, which SGLang computes differently from how {name} was "
            f"trained with; expected {types}"
        )


def absent(base: Checkpoint) -> Mapping[str, Any]:
    """Keys that SGLang ends for want of, and their values."""
    needed = NEEDED.get(base.family.name, {})
    return {key: value for key, value in needed.items() if base.config.get(key) is None}


def attention_window(base: Checkpoint) -> int:
    """The most tokens that attention looks back, 0 for all. SGLang's models of these families look back at all tokens,
    which gives the same result up to that many."""
    name, config = base.family.name, base.config
    used = name == "mixtral" or (name in QWEN and config.get("use_sliding_window"))
    return int(config.get("sliding_window") or 0) if used else 0
