"""How checkpoints scale float8 weights: what config.json says, and the tensors beside the weights. Reads nothing.

DeepSeek-V3 has one scale per block (weight_scale_inv); llm-compressor, AutoFP8, ModelOpt and transformers have one per
tensor or row (weight_scale, weight_scale_inv). In all of them, a weight is its code times its scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError

FLOAT8 = "F8_E4M3"
METHODS = ("fp8", "compressed-tensors", "modelopt")
"""Values of quant_method whose weights may be float8."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Of config.json."""
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATION_SCALES = ("input_scale", "activation_scale", "output_scale")
CACHE_SCALES = ("k_scale", "v_scale")
BLOCK = [128, 128]
"""Rows and columns of a block if config.json does not say."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's quantization section; empty if the weights are plain."""
    found: Any = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), {})
    return found if isinstance(found, dict) else {"quant_method": str(found)}


def block_size(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Rows and columns that share a scale; path: of config.json."""
    quantization = quantization_of(config)
    groups = quantization.get("config_groups")
    found = quantization.get("weight_block_size")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        found = found or (weights.get("block_structure") if isinstance(weights, dict) else None)
    found = found or BLOCK
    if not (isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)):
        raise LaunchError(str(path), f"weight_block_size is {found!r}, expected two numbers", "Get it again.")
    return found[0], found[1]


def scale_of(name: str, names: Collection[str]) -> str | None:
    """The tensor that scales a weight."""
    stem = name.removesuffix("weight")
    return next((stem + scale for scale in WEIGHT_SCALES if stem + scale in names), None)


def scale_form(shape: Sequence[int], weight: Sequence[int], block: Sequence[int]) -> str | None:
    """What one scale applies to: a tensor, a row or a block; None if the shape fits none of them."""
    rows, columns = weight
    if all(size == 1 for size in shape):
        return "tensor"
    if tuple(shape) in ((rows,), (rows, 1)):
        return "row"
    return "block" if tuple(shape) == (-(-rows // block[0]), -(-columns // block[1])) else None


def is_scale(name: str, float8: Collection[str]) -> bool:
    """Whether a tensor is useless without the given float8 weights: it scales one of them, or a float8 cache."""
    stem, _, last = name.rpartition(".")
    if last in CACHE_SCALES:
        return bool(float8)
    return last in (*WEIGHT_SCALES, *ACTIVATION_SCALES) and f"{stem}.weight" in float8
