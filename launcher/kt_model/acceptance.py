"""What counts as proven: the same at a start (kt_launch.proving) and for adapters loaded while serving
(kt_sglang.adapters.loading).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPT = "Question: what is the first thing you would say to someone you have never met before? Answer:"
TOP_LOGPROBS = 20
# Two runs of one prompt may differ by rounding; an adapter must differ by more than this multiple of that.
NOISE_FACTOR = 4.0
SMALLEST_DIFFERENCE = 1e-4

Logprobs = Mapping[Any, float]
"""A first token (id or text) → its logprob, for the most probable ones."""


def difference(one: Logprobs, other: Logprobs) -> float:
    """Largest |Δ logprob| over tokens in both; a token in only one counts with its distance to the other's lowest
    logprob."""
    floor_one, floor_other = min(one.values()), min(other.values())
    return max(abs(one.get(t, floor_one) - other.get(t, floor_other)) for t in one.keys() | other.keys())
