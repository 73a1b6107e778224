"""One adapter as a plan needs to know it. Reading it is the importer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LAYOUT_KEY, AUTO_LAYOUT = "lora.layout", "auto"
"""The key that says how B's columns run in fused experts, and its default, which leaves that to the files."""


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter that fits its base."""

    name: str
    path: Path
    rank: int
    """The largest of its modules."""
    alpha: float
    scale: float
    """What B·A is multiplied by in most of its modules."""
    scale_rule: str
    layout: str = ""
    """How the columns of B run in its fused experts, where it has any."""
    layout_why: str = ""
    """LAYOUT_KEY where it is typed."""
    pair_counts: Mapping[str, int] = field(default_factory=dict)
    """How many low-rank pairs go to routed experts, shared experts, attention, dense MLP, embedding."""
    missing_pairs: int = 0
    """Pairs of touched expert layers that the adapter leaves out."""
    target_modules: tuple[str, ...] = ()
    """Modules that it reaches, by PEFT's names, those of experts by their usual ones."""
    warnings: tuple[str, ...] = ()
    """What is odd about it, a sentence each."""

    @property
    def reaches_experts(self) -> bool:
        return self.pair_counts.get("routed expert", 0) > 0
