"""Whether a checkpoint has every tensor that is served, and as floating-point numbers, judged by its headers:
embedding, last norm and head, and in each layer what other layers of its kind have. Routed experts are checked in
checkpoint.py. What headers cannot show, the plugin finds once SGLang has loaded the model
(kt_sglang/checkpoint/unwritten_weights.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from kt_model.checkpoint import EMBEDDING, EXPERT_DTYPES, HEAD, LAYER, Checkpoint
from kt_model.errors import LaunchError, shown

NORM = "model.norm.weight"
PASSED_OVER = re.compile(r"\.experts\.|rotary_emb")
"""Experts are checked elsewhere; rotary frequencies are computed, and only old tools stored them."""
MLP = ("mlp.", "block_sparse_moe.")


def require_whole(base: Checkpoint, where: str) -> None:
    """Raise LaunchError naming missing tensors, or those of another type. where: the key that names the folder."""
    _require_numbers(base, where)
    outside = [name for name in (EMBEDDING, NORM, HEAD) if name not in base.located and name not in base.stand_ins]
    missing = [*outside, *_in_layers(base)]
    if not missing:
        return
    fix = "Download the whole checkpoint again."
    if HEAD in missing:
        fix = (
            "Download the whole checkpoint again; where its head is its embedding, config.json says "
            '"tie_word_embeddings": true.'
        )
    what = "1 tensor" if len(missing) == 1 else f"{len(missing)} tensors"
    raise LaunchError(where, f"{base.path} lacks {what} of the model: {shown(missing)}", fix)


def _require_numbers(base: Checkpoint, where: str) -> None:
    """Integers and float8 without a quantization_config would be taken for numbers, without their scales."""
    wrong = [
        name
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and tensor.dtype not in EXPERT_DTYPES and _is_served(name, base)
    ]
    if wrong:
        kinds = ", ".join(sorted({base.tensors[name].dtype for name in wrong}))
        problem = f"{base.path} has weights of type {kinds}, expected {', '.join(EXPERT_DTYPES)}: {shown(wrong)}"
        raise LaunchError(where, problem, "Use the bfloat16 checkpoint of this model.")


def _is_served(name: str, base: Checkpoint) -> bool:
    layer = LAYER.match(name)
    return layer is None or int(layer[1]) < base.num_layers


def _in_layers(base: Checkpoint) -> list[str]:
    """Attention and norms are the same in all layers; the rest is compared among layers with experts, and among those
    without."""
    parts = _parts(base)
    outside = {layer: {part for part in found if not part.startswith(MLP)} for layer, found in parts.items()}
    inside = {layer: {part for part in found if part.startswith(MLP)} for layer, found in parts.items()}
    dense = parts.keys() - set(base.moe_layers)
    missing = [*_absent(parts, outside), *_absent(base.moe_layers, inside), *_absent(dense, inside)]
    return sorted(missing, key=lambda name: (int(LAYER.match(name)[1]), name))  # type: ignore[index]


def _parts(base: Checkpoint) -> dict[int, set[str]]:
    """Layer -> its tensors, by their names within the layer."""
    parts: dict[int, set[str]] = {layer: set() for layer in range(base.num_layers)}
    for name in base.located:
        layer = LAYER.match(name)
        if layer and int(layer[1]) < base.num_layers and not PASSED_OVER.search(name):
            parts[int(layer[1])].add(name[layer.end() :])
    return parts


def _absent(layers: Collection[int], parts: Mapping[int, set[str]]) -> Iterator[str]:
    """What at least half of these layers have and one lacks; what fewer have may be left over."""
    counts = Counter(part for layer in layers for part in parts[layer])
    usual = {part for part, count in counts.items() if 2 * count >= len(layers)}
    return (f"model.layers.{layer}.{part}" for layer in layers for part in usual - parts[layer])
