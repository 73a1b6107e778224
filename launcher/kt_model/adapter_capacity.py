"""The capacity that a server reserves for adapters: for which modules, up to what rank, for how many at once. The
modules that a family supports follow from its checkpoint's tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kt_model.checkpoint import Checkpoint

DEFAULT_RANK = 16
DEFAULT_PER_BATCH = 2
"""One adapter loaded later, and the bare model; more adapters take turns."""
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")
"""In routed experts (whatever the family calls them), shared experts and dense layers. SGLang fuses them, and wraps
routed experts only if it has all three."""
ATTENTION_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Supported but not reserved by default: each slot has a row for every token of the vocabulary."""
MODULE = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp(?:\.shared_experts?)?)\.(\w+)\.weight")


def usual_modules(base: Checkpoint) -> list[str]:
    """All modules of the layers on which adapters can be served, by PEFT's names."""
    found = set(_leaves(base))
    return [*(name for name in ATTENTION_MODULES if name in found), *EXPERT_MODULES]


def possible_modules(base: Checkpoint) -> list[str]:
    """The default modules, and those that are supported only on request."""
    return [*usual_modules(base), *EMBEDDINGS]


def whole_groups(names: Collection[str]) -> list[str]:
    """The names, completed with those that SGLang accepts only together."""
    fused = [name for name in EXPERT_MODULES if not set(EXPERT_MODULES).isdisjoint(names)]
    return list(dict.fromkeys([*names, *fused]))


def count_modules(base: Checkpoint, names: Collection[str]) -> int:
    """How many matrices outside the routed experts have these names."""
    return sum(leaf in names for leaf in _leaves(base)) + sum(name in names for name in EMBEDDINGS)


def _leaves(base: Checkpoint) -> Iterator[str]:
    for name, tensor in base.tensors.items():
        if len(tensor.shape) == 2 and (match := MODULE.fullmatch(name)):
            yield match[1]
