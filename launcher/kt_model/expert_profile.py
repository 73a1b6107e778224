"""How often each routed expert was chosen: the file that kt.record_experts writes and kt.expert_profile reads.

JSON: {"format": "kt-launch expert profile", "experts": E, "layers": {"1": [E counts], …}}; layer numbers are the
checkpoint's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kt_model.atomic_file import read_regular, whole_file
from kt_model.errors import LaunchError

FORMAT = "kt-launch expert profile"


@dataclass(frozen=True)
class ExpertProfile:
    """Layer → how often each of its experts was chosen."""

    layers: Mapping[int, Sequence[int]]

    def most_used(self, layer: int, count: int) -> tuple[int, ...]:
        """The `count` most used experts, ascending; ties go to the first."""
        counts = self.layers[layer]
        return tuple(sorted(sorted(range(len(counts)), key=lambda expert: -counts[expert])[:count]))

    def share(self, count: int) -> float:
        """The share of all choices that fell on the `count` most used experts of each layer."""
        chosen = sum(self.layers[layer][expert] for layer in self.layers for expert in self.most_used(layer, count))
        return chosen / max(1, sum(map(sum, self.layers.values())))


def read_profile(path: Path, num_experts: int) -> ExpertProfile:
    """Raises LaunchError if the file is not a profile of a model with so many experts per layer."""
    expected = f'{{"format": "{FORMAT}", "layers": {{"1": [{num_experts} counts], …}}}}'
    fix = "Record one with kt.record_experts=<file>."
    try:
        found = json.loads(read_regular(path))
        layers = {int(layer): list(counts) for layer, counts in found["layers"].items()}
        sound = found["format"] == FORMAT and all(_is_counted(counts) for counts in layers.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise LaunchError("kt.expert_profile", f"{path}: {failure}, expected {expected}", fix) from failure
    if not sound or not layers:
        raise LaunchError("kt.expert_profile", f"{path} is no profile, expected {expected}", fix)
    for layer, counts in layers.items():
        if len(counts) != num_experts:
            problem = f"{path}: layer {layer} has {len(counts)} experts, the model {num_experts}"
            raise LaunchError("kt.expert_profile", problem, fix)
    return ExpertProfile(layers)


def chosen_name(profile: ExpertProfile | None, count: int) -> str:
    """Identifies a choice of resident experts; empty if there are none."""
    if not count:
        return ""
    if profile is None:
        return f"first {count}"
    chosen = [(layer, profile.most_used(layer, count)) for layer in sorted(profile.layers)]
    return f"{count} of {hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]}"


def _is_counted(counts: Sequence[object]) -> bool:
    return all(type(count) is int and count >= 0 for count in counts)


def write_profile(path: Path, layers: Mapping[int, Sequence[int]]) -> None:
    """Atomically: a reader finds the old file or the new one."""
    experts = len(next(iter(layers.values()), ()))
    found = {"format": FORMAT, "experts": experts, "layers": {str(layer): list(layers[layer]) for layer in layers}}
    with whole_file(path) as file:
        file.write(json.dumps(found).encode())
