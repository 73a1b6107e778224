"""Served logprobs against transformers in float32, in deviations of what bfloat16 rounds, on prompts whose choice of
experts does not hang on a rounding.

The server computes in bfloat16 (eps 2^-8). A decoder layer rounds what reaches its residual stream about twelve times
(two norms; q, k, v and their norms or rotation; attention and o_proj; gate, up, activation, down; two additions), the
head twice more, each by at most eps/2 relative and independently: std(Δ logit) ≈ eps/2 · sqrt(12L + 2) · std(logit). A
logprob is one logit against a log-sum of them, so twice that is one deviation here. The largest of 20 errors must stay
below 5; an adapter moves logprobs by 10 and more.

A token's routing is decided where its experts stay the same when each logit of the router gets noise of 3 deviations,
in each of 32 draws. Groups of experts (DeepSeek-V3) are chosen first, and a group that nearly ties makes the largest
jumps of all. Of long prompts some token is always undecided; there it is the last one's routing that has to be decided.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from launching import Running
from tiny_checkpoints import VOCABULARY

EPS, LAYERS = 2.0**-8, 3
NOISE_SIGMAS, DRAWS = 3, 32
LONG, LONG_PROMPTS, FEWEST = 240, 8, 3
"""Tokens of a long prompt, how many prompts are tried, and how many of them must be decided."""
FAR_OFF = 16
"""Deviations that rounding does not reach."""


class Float32Model:
    """A checkpoint in float32, and how safely its routers decide. It keeps its answers for who asks once more."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._decided = True
        self._answers: dict[tuple[int, ...], tuple[torch.Tensor, bool]] = {}
        routers = [module for name, module in self._model.named_modules() if name.endswith(".gate")]
        assert routers, "no router found"
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._watch_router, layer))

    def _watch_router(self, layer: int, router: Any, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        logits_TE = inputs[0].reshape(-1, router.weight.shape[1])[-1:].float() @ router.weight.float().T
        sigma = EPS / 2 * (12 * layer + 8) ** 0.5 * float(logits_TE.std())
        rng, chosen = torch.Generator().manual_seed(layer), self._choose(router, logits_TE)
        for _draw in range(DRAWS):
            noise = torch.randn(logits_TE.shape, generator=rng) * NOISE_SIGMAS * sigma
            self._decided &= bool((self._choose(router, logits_TE + noise) == chosen).all())

    def _choose(self, router: Any, logits_TE: torch.Tensor) -> torch.Tensor:
        """(T, E): which experts run."""
        config = self._model.config
        bias = getattr(router, "e_score_correction_bias", None)
        scores_TE = logits_TE if bias is None else logits_TE.sigmoid() + bias
        groups = getattr(config, "n_group", None) or 1
        if groups > 1:
            grouped = scores_TE.unflatten(-1, (groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            scores_TE = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        chosen = scores_TE.topk(config.num_experts_per_tok, dim=-1).indices
        return torch.zeros(scores_TE.shape, dtype=torch.bool).scatter_(1, chosen, True)

    def answer(self, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Logprobs (V,) of the next token; whether the routing of the last one is decided."""
        asked = tuple(ids[0].tolist())
        if asked not in self._answers:
            self._decided = True
            with torch.inference_mode():
                logits = self._model(ids).logits[0, -1]
            self._answers[asked] = torch.log_softmax(logits.float(), dim=-1), self._decided
        return self._answers[asked]


def errors_in_sigmas(found: dict[int, float], expected_V: torch.Tensor) -> torch.Tensor:
    """|Δ logprob| over the served top tokens, in deviations of the bound."""
    sigma = 2 * EPS / 2 * (12 * LAYERS + 2) ** 0.5 * float(expected_V.std())
    return torch.tensor([abs(p - float(expected_V[token])) for token, p in found.items()]) / sigma


def long_errors(running: Running, model: Float32Model, adapter: str | None = None, length: int = LONG) -> list[float]:
    """Largest error of each long prompt of random tokens whose last token's routing is decided, in deviations."""
    rng, errors = torch.Generator().manual_seed(0), []
    for _prompt in range(LONG_PROMPTS):
        ids = torch.randint(6, VOCABULARY, (1, length), generator=rng)
        expected_V, decided = model.answer(ids)
        if decided:
            found = running.logprobs(ids[0].tolist(), adapter)[0]
            errors.append(float(errors_in_sigmas(found, expected_V).max()))
    print(f"{adapter}: {[round(error, 1) for error in errors]} deviations")
    assert len(errors) >= FEWEST, "too few prompts with decided routing"
    return errors
