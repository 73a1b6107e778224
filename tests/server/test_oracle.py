"""Served first-token logprobs against Hugging Face transformers + PEFT in float32, base and adapters, three families.

The bound: the server computes in bfloat16 (eps 2^-8). A decoder layer rounds what reaches its residual stream about
twelve times (two norms; q, k, v and their norms or rotation; attention and o_proj; gate, up, activation, down; two
additions), the head twice more, each by at most eps/2 relative and independently:
std(Δ logit) ≈ eps/2 · sqrt(12L + 2) · std(logit). A logprob is one logit against a log-sum of them, so twice that is
one SIGMA here. The largest of 20 errors must stay below 5, their mean below 1.5; an adapter moves logprobs by 10 and
more.

That holds while both route alike. Where the k-th and the next router logit are closer than their own rounding, bfloat16
may choose another expert, and the difference is a jump that no rounding bound covers (transformers in bfloat16 jumps
there too). So the prompts compared are those whose float32 routing is decided by 5 such deviations everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import Running, launched
from tiny_checkpoints import write_checkpoint

pytestmark = pytest.mark.server
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral")
PROMPTS = (
    "hello world", "how are you", "the dog", "the quick brown fox", "fine", "what is", "good morning", "over there",
    "you and the fox", "a lazy dog", "jumps", "today", "is it fine", "thank you", "where is the dog", "the world",
    "we", "one", "two", "day", "sun", "moon", "red", "blue", "sea", "no", "yes", "cat", "old", "new", "go", "stop",
)  # fmt: skip
COMPARED = 3
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


@dataclass
class Truth:
    """What transformers and PEFT compute in float32: logprobs (V,) of the first token, and how safely it was routed."""

    logprobs_V: torch.Tensor
    routing_sigmas: float


class HuggingFace:
    """One model, perhaps with an adapter, in float32."""

    def __init__(self, checkpoint: Path, adapter: Path | None) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(model, adapter) if adapter is not None else model).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._top_k = int(model.config.num_experts_per_tok)
        self._margins: list[float] = []
        routers = [module for name, module in model.named_modules() if name.endswith(".gate")]
        assert routers, "no router found"
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._watch_router, layer))

    def _watch_router(self, layer: int, router: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        """Note by how many deviations of its rounding the closest decision of this layer was taken."""
        assert isinstance(router.weight, torch.Tensor)
        logits_TE = inputs[0].reshape(-1, router.weight.shape[1]).float() @ router.weight.float().T
        ordered_TE = logits_TE.sort(dim=-1, descending=True).values
        sigma = 2**0.5 * EPS / 2 * (12 * layer + 8) ** 0.5 * float(logits_TE.std())
        self._margins.append(float((ordered_TE[:, self._top_k - 1] - ordered_TE[:, self._top_k]).min()) / sigma)

    def answer(self, prompt: str) -> Truth:
        """The truth about one prompt."""
        self._margins.clear()
        ids = self._tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = self._model(ids).logits[0, -1]
        return Truth(torch.log_softmax(logits.float(), dim=-1), min(self._margins))


def compare(found: dict[int, float], expected_V: torch.Tensor, layers: int) -> tuple[float, float, float]:
    """Largest and mean |Δ logprob| over the served top tokens, and one standard deviation of the bound."""
    errors = torch.tensor([abs(p - float(expected_V[t])) for t, p in found.items()])
    sigma = 2 * EPS / 2 * (12 * layers + 2) ** 0.5 * float(expected_V.std())
    return float(errors.max()), float(errors.mean()), sigma


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_served_logprobs_match_transformers_and_peft(served: Served, adapter: str | None) -> None:
    model = HuggingFace(served.checkpoint, served.adapters[adapter] if adapter else None)
    truths = {prompt: model.answer(prompt) for prompt in PROMPTS}
    decided = [prompt for prompt in PROMPTS if truths[prompt].routing_sigmas > 5][:COMPARED]
    assert len(decided) == COMPARED, f"too few prompts with decided routing: {decided}"
    for prompt in decided:
        found = served.running.logprobs(prompt, adapter)[0]
        largest, mean, sigma = compare(found, truths[prompt].logprobs_V, layers=3)
        print(
            f"{served.checkpoint.parent.name} {adapter} {prompt!r}: max {largest:.4f} mean {mean:.4f} sigma {sigma:.4f}"
        )
        assert largest < 5 * sigma, f"{prompt!r}: max |Δ| {largest:.4f}, bound {5 * sigma:.4f}"
        assert mean < 1.5 * sigma, f"{prompt!r}: mean |Δ| {mean:.4f}, bound {1.5 * sigma:.4f}"


def test_adapters_are_far_from_the_base_on_that_scale(served: Served) -> None:
    base_V = HuggingFace(served.checkpoint, None).answer(PROMPTS[0]).logprobs_V
    for adapter in served.adapters:
        largest, _, sigma = compare(served.running.logprobs(PROMPTS[0], adapter)[0], base_V, layers=3)
        assert largest > 10 * sigma


def test_base_and_two_adapters_mix_in_one_batch(served: Served) -> None:
    order = [None, "experts_r8", "experts_r4", None, "experts_r8"]
    alone = {name: served.running.logprobs(PROMPTS[3], name)[0] for name in (None, *ADAPTERS)}
    mixed = served.running.logprobs([PROMPTS[3]] * len(order), order)
    for name, one in zip(order, mixed, strict=True):
        shared = one.keys() & alone[name].keys()
        assert len(shared) >= 15
        assert max(abs(one[t] - alone[name][t]) for t in shared) < 0.1
