"""Format A, and everything outside of routed experts: one pair per module, A (r, in), B (out, r)."""

from __future__ import annotations

from collections.abc import Iterator

from kt_model.importer.mistakes import Mistakes
from kt_model.importer.names import Key
from kt_model.importer.normal import Pair
from kt_model.importer.settings import Settings
from kt_model.tensors.stored import Stored


def read_pair(key: Key, a: Stored, b: Stored, settings: Settings, mistakes: Mistakes) -> Iterator[Pair]:
    """The pair of one module, with the rank that the configuration says."""
    got = f"{key.module} has A {list(a.shape)} and B {list(b.shape)}"
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        mistakes.add("tensors that are not a low-rank pair", f"{got}, expected (r, in) and (out, r)")
        return
    rank = settings.rank_of(key.peft_module)
    if a.shape[0] != rank:
        fix = "Take adapter_config.json and weights from the same save."
        mistakes.add("ranks that disagree with adapter_config.json", f"{got}, expected rank {rank}", fix)
        return
    yield Pair(key.target, a, b, settings.scale_of(key.peft_module), key.module)
