"""Served first-token logprobs against Hugging Face transformers + PEFT in float32, base and adapters, three families.

The bound: the server computes in bfloat16 (eps 2^-8). A decoder layer rounds its residual stream about six times (two
norms, attention and MLP outputs, two additions), the head twice more, each by at most eps/2 relative and independently:
std(Δ logit) ≈ eps/2 · sqrt(6L + 2) · std(logit). A logprob is one logit against a log-sum of them, so twice that is one
SIGMA here. The largest of 20 errors must stay below 5, their mean below 1.5; an adapter moves logprobs by 10 and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launching import Running, launched
from tiny_checkpoints import write_checkpoint

pytestmark = pytest.mark.server
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")
PROMPTS = ("hello world", "The quick brown fox jumps over", "how are you today? fine, and the dog?")
ADAPTERS = ("experts_r4", "experts_r8")
EPS = 2.0**-8


@dataclass
class Served:
    """A running server and the folders it was started on."""

    running: Running
    checkpoint: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, adapters: Path
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(request.param, folder / "model")
    paths = {name: adapters / request.param / name for name in ADAPTERS}
    rows = [f"lora.adapters.{name}.path={path}" for name, path in paths.items()]
    with launched("model=auto", f"model.path={checkpoint}", *rows, runs=folder / "runs") as running:
        yield Served(running, checkpoint, paths)


def hugging_face_logprobs(checkpoint: Path, adapter: Path | None, prompt: str) -> torch.Tensor:
    """(V,) float32 logprobs of the first token after `prompt`, by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(checkpoint)(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model.eval()(ids).logits[0, -1]
    return torch.log_softmax(logits.float(), dim=-1)


def compare(found: dict[int, float], expected_V: torch.Tensor, layers: int) -> tuple[float, float, float]:
    """Largest and mean |Δ logprob| over the served top tokens, and one standard deviation of the bound."""
    errors = torch.tensor([abs(p - float(expected_V[t])) for t, p in found.items()])
    sigma = 2 * EPS / 2 * (6 * layers + 2) ** 0.5 * float(expected_V.std())
    return float(errors.max()), float(errors.mean()), sigma


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_served_logprobs_match_transformers_and_peft(served: Served, adapter: str | None) -> None:
    for prompt in PROMPTS:
        found = served.running.logprobs(prompt, adapter)[0]
        expected = hugging_face_logprobs(served.checkpoint, served.adapters[adapter] if adapter else None, prompt)
        largest, mean, sigma = compare(found, expected, layers=3)
        print(
            f"{served.checkpoint.parent.name} {adapter} {prompt!r}: max {largest:.4f} mean {mean:.4f} sigma {sigma:.4f}"
        )
        assert largest < 5 * sigma, f"{prompt!r}: max |Δ| {largest:.4f}, bound {5 * sigma:.4f}"
        assert mean < 1.5 * sigma, f"{prompt!r}: mean |Δ| {mean:.4f}, bound {1.5 * sigma:.4f}"


def test_adapters_are_far_from_the_base_on_that_scale(served: Served) -> None:
    base = hugging_face_logprobs(served.checkpoint, None, PROMPTS[0])
    for adapter in served.adapters:
        largest, _, sigma = compare(served.running.logprobs(PROMPTS[0], adapter)[0], base, layers=3)
        assert largest > 10 * sigma


def test_base_and_two_adapters_mix_in_one_batch(served: Served) -> None:
    order = [None, "experts_r8", "experts_r4", None, "experts_r8"]
    alone = {name: served.running.logprobs(PROMPTS[1], name)[0] for name in (None, *ADAPTERS)}
    mixed = served.running.logprobs([PROMPTS[1]] * len(order), order)
    for name, one in zip(order, mixed, strict=True):
        shared = one.keys() & alone[name].keys()
        assert len(shared) >= 15
        assert max(abs(one[t] - alone[name][t]) for t in shared) < 0.1
