"""Format D, written by KT's training: fused_expert_lora.safetensors, stacked over experts, beside PEFT's own file.

Keys are layers.L.experts.{gate,up,down}_lora_{a,b}, A (E, r, in), B (E, out, r).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kt_model.importer import stacked
from kt_model.importer.mistakes import SAME_MODULE, Mistakes
from kt_model.importer.names import BaseModule
from kt_model.importer.normal import Pair
from kt_model.importer.settings import Settings
from kt_model.tensors.stored import Stored

FILE = "fused_expert_lora.safetensors"
KEY = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?:mlp\.)?experts\.(?P<projection>gate|up|down)_lora_(?P<side>[ab])"
)


def read_pairs(tensors: Mapping[str, Stored], settings: Settings, mistakes: Mistakes) -> Iterator[Pair]:
    """The pairs of all experts; the caller has kept only keys that match."""
    sides: dict[tuple[int, str], dict[str, Stored]] = {}
    keys: dict[tuple[int, str, str], str] = {}
    for key, stored in tensors.items():
        match = KEY.fullmatch(key)
        assert match is not None
        layer, projection, side = int(match["layer"]), match["projection"], match["side"]
        if (layer, projection, side) in keys:
            mistakes.add(SAME_MODULE, f"{keys[layer, projection, side]} and {key}")
        keys[layer, projection, side] = key
        sides.setdefault((layer, projection), {})[side] = stored
    for (layer, projection), found in sides.items():
        name = f"layers.{layer}.experts.{projection}"
        if set(found) != {"a", "b"}:
            mistakes.add("A without B" if "a" in found else "B without A", name, "Copy the whole file again.")
        else:
            target = BaseModule("routed_experts", layer, "", projection=projection)
            module = f"model.layers.{layer}.mlp.experts.{projection}_proj"
            yield from stacked.read_pairs(name, module, target, found["a"], found["b"], settings, mistakes)
