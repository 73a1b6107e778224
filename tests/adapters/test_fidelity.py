"""Every family on a running server: the base and an adapter of each layout, loaded while it serves, against
transformers and PEFT in float32 at 720 positions of random prompts; each family's checkpoint lies on the disk in
another of the ways that there are, with a head of its own or a tied one. What is demanded is
kt_launch/proving/agreement.py's, and tests/proving/test_agreement.py shows what it sees. `make fidelity` runs all
combinations and writes docs/fidelity.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from fidelity import (
    BASE,
    GRID,
    LAST_TOKENS,
    LAYOUTS,
    Case,
    Served,
    median_error,
    serving,
)
from float32_model import FAR_OFF, Float32Model, long_errors
from tiny_checkpoints import adapter_folder

from kt_launch.proving.agreement import FACTOR, compare
from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.importer import import_adapter
from kt_model.importer.serving import unserved_parts
from kt_model.weights.merging import merge

TIED = ("deepseek_v2", "qwen2_moe", "qwen3_moe")
BY_PEFT, TEXT = "experts_r8", "The quick brown fox jumps over"
CASES = tuple(
    replace(case, usual_sizes=adapter_folder(case.family, BY_PEFT).exists())
    for case in GRID
    if case.odd and case.tied == (case.family in TIED)
)
ADAPTERS = tuple(name for name in LAYOUTS if name != BASE)
SAME = 1e-3
"""Nats: what two ways of adding in float32 may differ by, tenfold."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case: Case = request.param
    with serving(case, tmp_path_factory.mktemp(case.family)) as running:
        yield running


@pytest.mark.server
@pytest.mark.parametrize("side", LAYOUTS)
def test_what_is_served_is_what_transformers_and_peft_compute(served: Served, side: str) -> None:
    found = compare(served.answer(side), served.reference(side))
    print(served.case, side, found)
    assert found.holds
    assert median_error(served.answer(side), served.reference(side), LAST_TOKENS) < FACTOR * found.rounding
    if side != BASE:
        assert not compare(served.answer(side), served.reference(BASE)).holds, "the adapter does nothing"


@pytest.mark.server
def test_an_adapter_on_everything_reaches_everything(served: Served) -> None:
    base = read_checkpoint(served.exact)
    imported = import_adapter(served.adapters["everything"], base)
    assert unserved_parts(imported, base) == {}
    assert {"routed_experts", "attention", "embeddings"} <= {pair.target.kind for pair in imported.pairs.values()}


@pytest.mark.server
@pytest.mark.parametrize("side", ADAPTERS)
def test_the_merged_checkpoint_is_what_peft_computes(served: Served, side: str, tmp_path: Path) -> None:
    base = read_checkpoint(served.exact)
    imported = import_adapter(served.adapters[side], base).require_sound()
    assert merge(ExpertSource(base), imported, tmp_path / "merged")
    reference = served.reference(side).logprobs_NM
    found_NV = served.run(torch.float32, model=tmp_path / "merged").logprobs()
    assert np.abs(found_NV.topk(reference.shape[1]).values.numpy() - reference).max() < SAME


@pytest.mark.server
def test_an_adapter_that_peft_saved(served: Served) -> None:
    folder = adapter_folder(served.case.family, BY_PEFT)
    if not folder.exists():
        pytest.skip(f"none of {served.case.family} is kept")
    served.adapters[BY_PEFT] = folder
    assert compare(served.answer(BY_PEFT), served.reference(BY_PEFT)).holds
    assert not compare(served.answer(BY_PEFT), served.reference(BASE)).holds


@pytest.mark.server
def test_base_and_two_adapters_mix_in_one_batch(served: Served) -> None:
    sides = [BASE, "fused", "everything", BASE, "fused"]
    with served.loaded("fused") as name:
        names = [{BASE: None, "fused": name}.get(side, side) for side in sides]
        mixed = served.running.logprobs([TEXT] * len(sides), names)
        alone = {side: served.running.logprobs(TEXT, one)[0] for side, one in zip(sides, names, strict=True)}
    for side, one in zip(sides, mixed, strict=True):
        shared = one.keys() & alone[side].keys()
        assert len(shared) >= 15
        assert max(abs(one[token] - alone[side][token]) for token in shared) < 0.1


@pytest.mark.server
def test_positions_far_apart_are_those_of_the_base(served: Served) -> None:
    errors = long_errors(served.running, Float32Model(served.exact))
    assert median(errors) < 5
    assert max(errors) < FAR_OFF


@pytest.mark.server
@pytest.mark.parametrize("served", [case for case in CASES if case.family == "deepseek_v3"], indirect=True, ids=str)
def test_a_scaling_that_the_model_was_not_trained_with_would_be_seen(served: Served, tmp_path: Path) -> None:
    scaled = shutil.copytree(served.exact, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    assert median(long_errors(served.running, Float32Model(scaled))) > FAR_OFF
