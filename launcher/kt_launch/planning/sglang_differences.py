"""Models that SGLang computes differently from their config.json, mostly without a warning. A plan refuses such a
model; a row can go once SGLang computes it. The differences were found by comparing logprobs with transformers in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kt_model.checkpoint import Checkpoint

MLA = ("deepseek_v2", "deepseek_v3")
QWEN = ("qwen2_moe", "qwen3_moe")


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


DEPARTURES = (
    Departure(MLA, _says("attention_bias"), "computes attention without biases"),
    Departure(("deepseek_v2",), _says("mlp_bias"), "computes dense layers and shared experts without biases"),
    Departure(QWEN, _dense_layers, "has experts in every layer"),
    Departure(("mixtral", "qwen2_moe"), _head_size, "divides hidden_size by num_attention_heads"),
)


def departures(base: Checkpoint) -> Iterator[str]:
    """One sentence per difference."""
    name = base.family.name
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


def attention_window(base: Checkpoint) -> int:
    """The most tokens that attention looks back, 0 for all. SGLang's models of these families look back at all tokens,
    which gives the same result up to that many."""
    name, config = base.family.name, base.config
    used = name == "mixtral" or (name in QWEN and config.get("use_sliding_window"))
    return int(config.get("sliding_window") or 0) if used else 0
