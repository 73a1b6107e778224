"""Validates config.json of a checkpoint: types and sizes of the values that are read. What they mean is decided in
checkpoint.py and families.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError
from kt_model.families import FAMILIES, Family
from kt_model.jsonfile import read_json

LARGEST = 10**9
"""Upper bound of every number but the layers'."""
MOST_LAYERS = 10_000
MOST_BYTES = 1 << 20
"""Largest size of the file."""
NUMBERS = (
    *("vocab_size", "max_position_embeddings", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "sliding_window"),
)
"""Integer keys of every family; absent and null are equivalent."""
CONTEXT_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""What SGLang takes for the longest context: the first of them that is given."""
ROTARY = ("rope_scaling", "rope_parameters")
AGAIN = "Download the file again."


def read_model_config(path: Path, where: str) -> tuple[dict[str, Any], Family]:
    """The file's content and its family. Raises LaunchError for the first invalid value. where: the key that names the
    checkpoint."""
    config = read_json(path, where, MOST_BYTES)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        model_type = model_type if isinstance(model_type, str) else _short(model_type)
        problem = f"{path} has model_type {model_type}, which is not a supported Mixture-of-Experts family"
        raise LaunchError(where, problem, f"Supported are {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    for key in _numbers(family):
        _require(path, key, config.get(key), is_number(config.get(key)), f"a whole number from 0 to {LARGEST}")
    for key in CONTEXT_KEYS:
        length = config.get(key)
        _require(path, key, length, length is None or (type(length) is int and length >= 0), "a number of tokens")
    layers = config.get("num_hidden_layers")
    _require(path, "num_hidden_layers", layers, (layers or 0) <= MOST_LAYERS, f"at most {MOST_LAYERS}")
    _validate_lists(path, config, family)
    for key in ROTARY:
        _validate_rotary(path, key, config.get(key))
    return config, family


def _numbers(family: Family) -> list[str]:
    own = [family.experts_key, family.intermediate_key, family.new_experts_key, family.top_k_key]
    own += (family.first_dense_key, family.step_key, family.shared_key, family.shared_width_key)
    return [*filter(None, own), "num_hidden_layers", "hidden_size", *NUMBERS]


def is_number(value: Any) -> bool:
    """A whole number of a plausible size, or None."""
    return value is None or (type(value) is int and 0 <= value <= LARGEST)


def _validate_lists(path: Path, config: Mapping[str, Any], family: Family) -> None:
    names = config.get("architectures")
    is_list = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    _require(path, "architectures", names, is_list, "a list of names")
    if family.dense_layers_key:
        layers = config.get(family.dense_layers_key)
        is_list = layers is None or (isinstance(layers, list) and all(type(layer) is int for layer in layers))
        _require(path, family.dense_layers_key, layers, is_list, "a list of layers")


def _validate_rotary(path: Path, key: str, value: Any) -> None:
    _require(path, key, value, value is None or isinstance(value, dict), "an object")
    for name in ("rope_type", "type"):
        kind = (value or {}).get(name)
        _require(path, f"{key}.{name}", kind, kind is None or isinstance(kind, str), "a name")
    factor = (value or {}).get("factor")
    is_factor = factor is None or (type(factor) in (int, float) and 0 <= factor <= LARGEST and math.isfinite(factor))
    _require(path, f"{key}.factor", factor, is_factor, f"a number from 0 to {LARGEST}")


def _require(path: Path, key: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise LaunchError(str(path), f"{key} is {_short(value)}, but {expected} is expected", AGAIN)


def _short(value: Any) -> str:
    try:
        text = repr(value) if isinstance(value, str | list | dict) else str(value)
    except (ValueError, RecursionError):  # more digits than Python turns into text
        return "a value without end"
    return text if len(text) <= 60 else f"{text[:57]}..."
