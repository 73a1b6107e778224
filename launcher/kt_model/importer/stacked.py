"""Experts stacked in three dimensions, A (E, r, in) and B (E, out, r): written by KT's training (kt_training.py), and
by Tinker under the names experts.w1, w2, w3.

In Tinker's files the outer factor, A of gate and up and B of down, has one entry, shared by all experts
(https://github.com/thinking-machines-lab/tinker-cookbook, weights/_merge.py). It is not copied: all pairs view it.
"""

from __future__ import annotations

from collections.abc import Iterator

from kt_model.importer.mistakes import Mistakes
from kt_model.importer.names import BaseModule, expert_module
from kt_model.importer.normal import Pair
from kt_model.importer.settings import Settings
from kt_model.tensors.stored import Stored


def read_pairs(
    name: str, module: str, target: BaseModule, a: Stored, b: Stored, settings: Settings, mistakes: Mistakes
) -> Iterator[Pair]:
    """The pairs of one projection for all experts of a layer; problems are added to `mistakes`.

    name: as in the file; module: as PEFT's patterns are matched; place: the position of all experts together.
    """
    got = f"{name} has A {list(a.shape)} and B {list(b.shape)}"
    if not _is_stack(a, b):
        mistakes.add("tensors that are not low-rank pairs", f"{got}, expected (E, r, in) and (E, out, r)")
        return
    rank = settings.rank_of(module)
    if a.shape[1] != rank:
        fix = "Take adapter_config.json and weights from the same training run."
        mistakes.add("ranks that disagree with adapter_config.json", f"{got}, expected rank {rank}", fix)
        return
    assert target.layer is not None
    for expert in range(max(a.shape[0], b.shape[0])):
        own_a, own_b = (stack[min(expert, stack.shape[0] - 1)] for stack in (a, b))
        own = expert_module(target.layer, expert, target.projection)
        yield Pair(own, own_a, own_b, settings.scale_of(module), f"{name}[{expert}]")


def _is_stack(a: Stored, b: Stored) -> bool:
    if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[1] != b.shape[2]:
        return False
    return a.shape[0] == b.shape[0] or 1 in (a.shape[0], b.shape[0])
