"""The facts of one adapter that a plan needs. The importer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LAYOUT_KEY, AUTO_LAYOUT = "lora.layout", "auto"
"""The key for the order of B's columns in fused experts, and its default, which lets the files decide."""


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter that matches its base."""

    name: str
    path: Path
    rank: int
    """The largest rank of its modules."""
    alpha: float
    scale: float
    """The factor of B·A in most of its modules."""
    scale_rule: str
    layout: str = ""
    """The order of B's columns in its fused experts, if it has any."""
    layout_why: str = ""
    """Where the order comes from; LAYOUT_KEY if it was typed."""
    pair_counts: Mapping[str, int] = field(default_factory=dict)
    """Number of low-rank pairs on routed experts, shared experts, attention, dense MLP, embedding."""
    missing_pairs: int = 0
    """Pairs that the adapter lacks in expert layers that it changes."""
    target_modules: tuple[str, ...] = ()
    """Modules that it changes, by PEFT's names; those of experts by their usual names."""
    warnings: tuple[str, ...] = ()
    """Warnings about it, one sentence each."""

    @property
    def expert_pairs(self) -> int:
        """Of them, those on routed experts."""
        return self.pair_counts.get("routed expert", 0)

    @property
    def reaches_experts(self) -> bool:
        return self.expert_pairs > 0
