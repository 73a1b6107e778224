"""Every family on two processes: split among them, with experts of both or of the first, and as two copies. The
launch's own proof holds base and adapter of each against transformers and PEFT in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from fidelity import EXPERTS, SIZE
from launching import launched, read_json
from tiny_checkpoints import FAMILIES, write_checkpoint
from written import write_per_expert

from kt_model.families import FAMILIES as ROWS

pytestmark = [pytest.mark.server, pytest.mark.nightly]


@pytest.mark.parametrize("keys", [("server.tp=2",), ("server.tp=2", "kt.tp_experts=rank0"), ("server.dp=2",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_the_model(family: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    model = write_checkpoint(family, tmp_path / "model")
    ends = [f".experts.{expert}.{part}" for expert in range(EXPERTS) for part in ROWS[family].projections]
    adapter = write_per_expert(tmp_path / "adapter", model, [*ends, ".o_proj"], seed=1, size=SIZE)
    words = ["model=auto", f"model.path={model}", "lora=none", f"lora.adapters.a.path={adapter}", "proof.text=warn"]
    with launched(*words, *keys, runs=tmp_path / "runs") as running:
        proof = read_json(running.run_folder / "proof.json")
    assert (proof["schedulers"], proof["replicas"]) == (2, 2 if "server.dp=2" in keys else 1)
    assert proof["computing"] == (1 if "kt.tp_experts=rank0" in keys else 2)
    sides = proof["content"]["whole_model"]["checked"]
    assert {*sides} == {"base", "a"}
    assert proof["difference"]["a"] > 0
