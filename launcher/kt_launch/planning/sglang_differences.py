"""Where SGLang computes something else than config.json says, mostly without a word. A plan refuses such a model; a row
goes when SGLang computes it. That it departs was seen by comparing logprobs with transformers in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kt_model.checkpoint import Checkpoint

MLA = ("deepseek_v2", "deepseek_v3")
QWEN = ("qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Departure:
    """asks: what config.json says that SGLang does not do, in words, or nothing. instead: what SGLang does."""

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
    """Sentences, one for each."""
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
    """Tokens that attention looks back to at most, 0 for all. SGLang's models of these families look back to all, which
    is the same up to that many tokens."""
    name, config = base.family.name, base.config
    used = name == "mixtral" or (name in QWEN and config.get("use_sliding_window"))
    return int(config.get("sliding_window") or 0) if used else 0
