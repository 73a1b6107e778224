"""A server whose adapters are held against transformers on the checkpoint that action=merge makes of them.

The unit is that of tests/support/float32_model.py: a standard deviation is 2·eps/2·sqrt(2L+1)·std(logits). The median
prompt's largest error must be below 6 of them, as there. One prompt may reach 16: where two experts nearly tie in the
router, bfloat16 picks the other one. The adapters move logprobs by 50 and more, so a part that is left out shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from launching import TOP, Running
from safetensors.torch import load_file, save_file
from written import write_converted, write_fused, write_kt_training, write_per_expert

from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.importer import import_adapter
from kt_model.weights.merging import merge

EPS, LAYERS = 2.0**-8, 3
PROMPT = "The quick brown fox jumps over"
PROMPTS = ("hello world", PROMPT, "Why does bread rise", "a boy was whistling", "Tell me which numbers")
ATTENTION = [".q_proj", ".kv_a_proj_with_mqa", ".kv_b_proj", ".o_proj"]
EXPERTS = [f".experts.{expert}.{part}_proj" for expert in range(8) for part in ("gate", "up", "down")]
DENSE = [f".{place}.{part}_proj" for place in ("mlp", "shared_experts") for part in ("gate", "up", "down")]
LOGPROB_NOISE = 0.1
STARTED = ("attention", "patterns", "kt")
"""Those that a server has from its start on."""
Logprobs = dict[str | None, list[torch.Tensor]]
"""By adapter, and None for the base: of each prompt's next token."""


def write_adapters(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """On a DeepSeek-V2 checkpoint, of every format."""
    return {
        "attention": write_per_expert(folder / "attention", checkpoint, ATTENTION, seed=1),
        "patterns": write_per_expert(
            folder / "patterns",
            checkpoint,
            [*EXPERTS, *DENSE, ".o_proj"],
            seed=2,
            ranks={"down_proj": 6, "o_proj": 2},
            alpha_pattern={"up_proj": 3},
            lora_alpha=3,
            use_rslora=True,
        ),
        "up": write_per_expert(folder / "up", checkpoint, [end for end in EXPERTS if "up_proj" in end], seed=3),
        "fused": write_fused(folder / "fused", checkpoint, seed=4),
        "converted": write_converted(folder / "converted", checkpoint, seed=7, rank=2),
        "fused_old": write_fused(folder / "fused_old", checkpoint, seed=5, old=True),
        "kt": write_kt_training(folder / "kt", checkpoint, seed=6),
    }


class Served:
    """A running server, its checkpoint, and the adapters: those of STARTED are there from its start on, the others are
    loaded by a test. before: first answers, one adapter after another."""

    def __init__(self, running: Running, checkpoint: Path, adapters: dict[str, Path]) -> None:
        self.running, self.checkpoint, self.adapters = running, checkpoint, adapters
        self.before = {name: running.logprobs(PROMPT, name)[0] for name in (None, *STARTED)}

    def post(self, what: str, **body: Any) -> httpx.Response:
        return self.running.client.post(what, json=body)

    def load(self, name: str) -> httpx.Response:
        return self.post("/load_lora_adapter", lora_name=name, lora_path=str(self.adapters[name]))

    def unload(self, name: str) -> None:
        self.post("/unload_lora_adapter", lora_name=name).raise_for_status()

    def check(self, name: str | None, expected: Logprobs) -> None:
        """Served logprobs against those of the merged checkpoint, over all prompts."""
        deviations = []
        for prompt, expected_V in zip(PROMPTS, expected[name], strict=True):
            found = self.running.logprobs(prompt, name)[0]
            error = max(abs(p - float(expected_V[token])) for token, p in found.items())
            deviations.append(error / (2 * EPS / 2 * (2 * LAYERS + 1) ** 0.5 * float(expected_V.std())))
        shown = f"{name}: max |Δ| in standard deviations {[round(one, 1) for one in deviations]}"
        print(shown)
        assert sorted(deviations)[len(deviations) // 2] < 6, shown
        assert max(deviations) < 16, shown

    def check_unchanged(self, name: str | None) -> None:
        """The answer is the one from before."""
        distance = self.distance(self.running.logprobs(PROMPT, name)[0], name)
        assert distance < LOGPROB_NOISE, f"{name}: {distance:.3f} off its first answer"

    def distance(self, found: dict[int, float], name: str | None) -> float:
        """Largest difference over the tokens that both name; infinite where the likeliest tokens are others."""
        shared = found.keys() & self.before[name].keys()
        if len(shared) < TOP * 0.7:
            return float("inf")
        return max(abs(found[token] - self.before[name][token]) for token in shared)


def logprobs_of_merged(checkpoint: Path, adapters: Mapping[str, Path], folder: Path) -> Logprobs:
    """Of checkpoints merged in float32 below `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exact = shutil.copytree(checkpoint, folder / "exact")
    weights = load_file(exact / "model.safetensors")
    float32 = {name: tensor.float() for name, tensor in weights.items()}
    save_file(float32, exact / "model.safetensors", metadata={"format": "pt"})
    base = read_checkpoint(exact)
    models: dict[str | None, Path] = {None: checkpoint}
    for name, adapter in adapters.items():
        models[name] = folder / "merged" / name
        merge(ExpertSource(base), import_adapter(adapter, base).require_sound(), folder / "merged" / name)
    tokenizer, logprobs = AutoTokenizer.from_pretrained(checkpoint), Logprobs()
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    for side, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            logprobs[side] = [torch.log_softmax(model(one).logits[0, -1].float(), dim=-1) for one in ids]
    return logprobs
