"""A server with one thing wrong in it that nobody else has: a plugin of SGLang swaps two attention weights after the
load. Experts and adapters are right, so what the schedulers report of them says nothing. `make test` ends a launch so
in tests/operations/test_living.py, where the stand-in computes another model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import finish
from other_plugin import write_plugin

pytestmark = [pytest.mark.server, pytest.mark.nightly]
PLUGIN = """
import torch

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    target = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
    HookRegistry.register(target, swap, HookType.AFTER)

def swap(result, runner, *_, **__):
    weights = dict(runner.model.named_parameters())
    one, other = (weights[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in (1, 2))
    with torch.no_grad():
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
    return result
"""


def test_swapped_attention_weights_end_the_launch(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(write_plugin(tmp_path / "site", "swapping", PLUGIN))}
    code, out, errors = finish("server.extra_args=[--stream-interval,'8']", runs=tmp_path / "runs", env=env)
    assert code == 4, errors
    assert "error: proof: the server does not compute the model of " in errors
    assert "against transformers in float32. Worst: prompt " in errors
    assert "leave out what of server.extra_args (--stream-interval) changes what is computed, or report" in errors
    assert "Traceback" not in errors and "ready:" not in out
    (request,) = (tmp_path / "runs").rglob("float32/request.json")
    assert {file.name for file in request.parent.iterdir()} >= {"reference-0.npz", "served-0.npz"}
    assert json.loads((request.parent.parent / "state.json").read_text())["exit_code"] == 4
