"""Served first-token logprobs against transformers in float32, with each adapter added to the weights.

The unit is that of tests/server/test_oracle.py: a standard deviation is 2·eps/2·sqrt(2L+1)·std(logits). The median
prompt's largest error must be below 6 of them; one prompt may reach 16: where two experts nearly tie in the router,
bfloat16 picks the other one. What another adapter, or none, would answer is far beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from launching import Running
from written import add_to_model

from kt_model.checkpoint import read_checkpoint
from kt_model.importer import import_adapter

EPS = 2.0**-8
MEDIAN, LARGEST = 6, 16
PROMPTS = ("hello world", "The quick brown fox jumps over", "Why does bread rise", "a boy was whistling", "Tell me")
Reference = dict[str | None, list[torch.Tensor]]


def reference_of(checkpoint: Path, adapters: Mapping[str, Path]) -> Reference:
    """By adapter, and None for the base: logprobs of each prompt's next token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tokenizer, found = read_checkpoint(checkpoint), AutoTokenizer.from_pretrained(checkpoint), {}
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    for name, folder in [(None, None), *adapters.items()]:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        if folder:
            add_to_model(model, import_adapter(folder, base).require_sound())
        with torch.inference_mode():
            found[name] = [torch.log_softmax(model(one).logits[0, -1].float(), dim=-1) for one in ids]
    return found


def require_match(running: Running, reference: Reference, name: str | None, layers: int = 3) -> None:
    """It answers as its reference does, and not as any other."""
    apart = {other: _deviations(running, name, reference[other], layers) for other in reference}
    own = sorted(apart.pop(name))
    shown = f"{name}: in standard deviations {own}, apart { ({other: min(far) for other, far in apart.items()}) }"
    print(shown)
    assert own[len(own) // 2] < MEDIAN, shown
    assert own[-1] < LARGEST < min(min(far) for far in apart.values()), shown


def _deviations(running: Running, name: str | None, expected: list[torch.Tensor], layers: int) -> list[float]:
    """Largest error of each prompt."""
    found = [running.logprobs(prompt, name)[0] for prompt in PROMPTS]
    units = [2 * EPS / 2 * (2 * layers + 1) ** 0.5 * float(one.std()) for one in expected]
    return [
        round(max(abs(p - float(one[token])) for token, p in logprobs.items()) / unit, 1)
        for logprobs, one, unit in zip(found, expected, units, strict=True)
    ]
