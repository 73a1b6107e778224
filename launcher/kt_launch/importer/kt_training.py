"""Format D, what KT's training writes: fused_expert_lora.safetensors, stacked over experts, beside PEFT's own file.

Keys are layers.L.experts.{gate,up,down}_lora_{a,b}, A (E, r, in), B (E, out, r).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kt_launch.importer.mistakes import Mistakes
from kt_launch.importer.names import expert_place
from kt_launch.importer.normal import Pair
from kt_launch.importer.settings import Settings
from kt_launch.importer.stored import Stored

FILE = "fused_expert_lora.safetensors"
KEY = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?:mlp\.)?experts\.(?P<projection>gate|up|down)_lora_(?P<side>[ab])"
)


def read_pairs(tensors: Mapping[str, Stored], settings: Settings, mistakes: Mistakes) -> Iterator[Pair]:
    """The pairs of all experts; the caller has kept only keys that match."""
    sides: dict[tuple[int, str], dict[str, Stored]] = {}
    for key, stored in tensors.items():
        match = KEY.fullmatch(key)
        assert match is not None
        found = sides.setdefault((int(match["layer"]), match["projection"]), {})
        if match["side"] in found:
            mistakes.add("keys that mean the same module", key)
        found[match["side"]] = stored
    for (layer, projection), found in sides.items():
        name = f"layers.{layer}.experts.{projection}"
        if set(found) != {"a", "b"}:
            mistakes.add("A without B" if "a" in found else "B without A", name, "Get the whole file again.")
        else:
            yield from _stacked(name, layer, projection, found, settings, mistakes)


def _stacked(
    name: str, layer: int, projection: str, found: Mapping[str, Stored], settings: Settings, mistakes: Mistakes
) -> Iterator[Pair]:
    a, b = found["a"], found["b"]
    got = f"{name} has a {list(a.shape)} and b {list(b.shape)}"
    if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        mistakes.add("tensors that are no low-rank pairs", f"{got}, expected (E, r, in) and (E, out, r)")
        return
    module = f"model.layers.{layer}.mlp.experts.{projection}_proj"
    if a.shape[1] != settings.rank_of(module):
        fix = "Take adapter_config.json and weights from one training run."
        expected = f"expected rank {settings.rank_of(module)}"
        mistakes.add("ranks that disagree with adapter_config.json", f"{got}, {expected}", fix)
        return
    for expert in range(a.shape[0]):
        place = expert_place(layer, expert, projection)
        yield Pair(place, a[expert], b[expert], settings.scale_of(module), f"{name}[{expert}]")
