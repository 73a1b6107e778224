"""The number formats of routed experts, and where their weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Where a method's base weights are read from, and whether they come with scales."""

    weights: str
    scales: bool


METHODS: Mapping[str, Method] = {
    "AMXBF16_SFT": Method("model.path", scales=False),
    "AMXINT8_SFT": Method("kt.weight_path", scales=True),
    "AMXINT4_SFT": Method("kt.weight_path", scales=True),
}
