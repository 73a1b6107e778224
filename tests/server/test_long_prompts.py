"""A server whose experts come to the model's device for long prompts, as on a GPU. Here the device is a CPU, where no
plan asks for it: a plugin of SGLang does. The start's own proof, base and adapter against transformers in float32, then
goes that way, with some of the experts resident, whose adapters are grouped as those of a long prompt are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import Running, launched
from other_plugin import write_plugin
from written import write_per_expert

pytestmark = pytest.mark.server
ENDS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
DEMO = Path(__file__).parents[2] / "demo" / "model"
TOKENS, STEP = 12, 4096
PLUGIN = f"""
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", bring, HookType.AFTER)

def bring(result, runner, *_, **__):
    import torch
    from kt_sglang.experts import method as experts, resident_adapters
    from kt_sglang.prompts import prefill
    prefill.start({{"tokens": {TOKENS}}}, torch.device("cpu"), prefill.most_at_once())
    print("tokens of a step:", prefill.most_at_once(), flush=True)
    experts.after_load_model(result, runner)
    resident_adapters.LEAST_GROUPED_BYTES = 0
    resident_adapters.ResidentAdapters.hooks = tell(resident_adapters.ResidentAdapters.hooks)
    return result

def tell(hooks):
    def told(*batch):
        found = hooks(*batch)
        print("adapters of resident experts:", type(found).__name__, flush=True)
        return found
    return told
"""


def test_long_prompts_are_proven_and_answered_with_experts_that_were_brought(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(write_plugin(tmp_path / "site", "bringing", PLUGIN))}
    words = "kt.packed_cache=off", "kt.num_gpu_experts=3", f"server.chunked_prefill_size={STEP}"
    with launched(*words, f"lora.allow=[{tmp_path}]", runs=tmp_path / "runs", env=env) as running:
        proven = found(running)
        assert (proven["state"], proven["why"], proven["tokens"]) == ("on", "typed", TOKENS)
        assert len(proven["errors"]) == 2 and all(0 < error < 0.02 for error in proven["errors"].values())
        assert proven["tokens_ran"] > 20 * TOKENS and proven["adapter_tokens_ran"] > 5 * TOKENS
        proof = json.loads((running.run_folder / "proof.json").read_text())
        assert proof["content"]["whole_model"]["checked"]
        running.logprobs([*range(5, 45)], "west")
        later = found(running)
        assert later["adapter_tokens_ran"] - proven["adapter_tokens_ran"] == 40
        overflowing = write_per_expert(tmp_path / "overflowing", DEMO, ENDS, size=3e19)
        refused = running.client.post("/load_lora_adapter", json={"lora_name": "o", "lora_path": str(overflowing)})
        assert refused.status_code == 400 and "NaN or infinite" in refused.text
        assert found(running)["state"] == "on", "what it computes is no difference of the two ways"
        assert "Paris" in running.chat("demo", "What is the capital of France?")
        log = (running.run_folder / "server.log").read_text()
        assert "adapters of resident experts: GroupedHooks" in log and "GatheredHooks" not in log
        assert f"tokens of a step: {STEP}\n" in log
        assert "not compiled ahead" not in log and "are gathered:" not in log


def found(running: Running) -> dict[str, Any]:
    """The scheduler's report."""
    state = running.client.get("/server_info").json()["internal_states"][0]
    report: dict[str, Any] = state["kt_launch"]["gpu_prefill"]
    return report
