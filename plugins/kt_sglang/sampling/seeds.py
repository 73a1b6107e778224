"""Requests with a `seed` are sampled by it: the same seed, prompt and parameters give the same text, on a GPU and on a
CPU. How several answers to one request get seeds of their own is in edge/seeds.py.

Trigger: a request with a seed. SGLang obeys it only with `--enable-deterministic-inference`, which needs attention
backends for GPUs, and passes it over in silence otherwise. Safe because rows without a seed keep the token that SGLang
chose, and a row with one is chosen from the same probabilities by the same top_k, top_p and min_p. Nothing is done
where SGLang obeys seeds itself. Remove when it does so always.

Shapes: B rows of a batch, R of them with a seed, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SEEDS = "kt_seeds"
"""Attribute of SGLang's SamplingBatchInfo: (rows, seeds), both (R,) int64 on its device; None if no row has a seed."""
STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers."""
UNIFORM_BITS = 52


class Filters(NamedTuple):
    """Each (R,): the most tokens, their probability in all, and the least one as a part of the largest."""

    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor


def after_init_new(batch: Any, cls: Any, scheduled: Any, *others: Any, **more: Any) -> Any:
    """AFTER hook of `ForwardBatch.init_new`, where requests and rows of a step are known together."""
    info = batch.sampling_info
    if info is not None and info.sampling_seed is None:
        setattr(info, SEEDS, _seeds(scheduled.reqs, info.temperatures.device))
    return batch


def around_sample_from_probs(
    original: Callable[..., Any],
    sampler: Any,
    probs_BV: torch.Tensor,
    info: Any,
    positions_B: torch.Tensor,
    unfiltered: bool,
) -> Any:
    """AROUND hook of `Sampler._sample_from_probs`: (tokens, what SGLang notes of filtered probabilities). unfiltered:
    no row of the batch has a filter, which spares sorting the tokens."""
    tokens_B, noted = original(sampler, probs_BV, info, positions_B, unfiltered)
    if (seeded := getattr(info, SEEDS, None)) is None:
        return tokens_B, noted
    rows_R, seeds_R = seeded
    probs_RV = probs_BV[rows_R]
    if not unfiltered:
        probs_RV = filtered(probs_RV, Filters(info.top_ks[rows_R], info.top_ps[rows_R], info.min_ps[rows_R]))
    chosen_R = sample(probs_RV, seeds_R, positions_B[rows_R])
    tokens_B = tokens_B.index_copy(0, rows_R, chosen_R.to(tokens_B.dtype))
    return tokens_B, noted._replace(selected_weight=None) if noted is not None else None


def sample(probs_RV: torch.Tensor, seeds_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """(R,) int64 tokens. An exponential race: each token waits -log(u) / p, with u from seed, position and token, and
    the first wins. So a probability that differs in its last bits, as it does beside other requests, hardly ever
    changes the token."""
    return (-uniforms(seeds_R, positions_R, probs_RV.shape[1]).log() / probs_RV.double()).argmin(dim=-1)


def filtered(probs_RV: torch.Tensor, filters_R: Filters) -> torch.Tensor:
    """The probabilities, 0 for what SGLang's filters leave out: all of them look at the unfiltered probabilities. A
    filter of another row of the batch changes nothing in a row without one."""
    sorted_RV, tokens_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_RV.shape[1], device=probs_RV.device)
    out_RV = rank_V[None, :] >= filters_R.top_ks[:, None]
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    out_RV |= (before_RV > filters_R.top_ps[:, None]) & (filters_R.top_ps[:, None] < 1)
    out_RV |= sorted_RV < sorted_RV[:, :1] * filters_R.min_ps[:, None]
    return torch.zeros_like(probs_RV).scatter_(1, tokens_RV, sorted_RV.masked_fill(out_RV, 0))


def uniforms(seeds_R: torch.Tensor, positions_R: torch.Tensor, tokens: int) -> torch.Tensor:
    """(R, tokens) float64 within (0, 1), the same on every device."""
    key_R = _mixed(_mixed(seeds_R.long()) + positions_R.long())
    token_V = torch.arange(tokens, device=seeds_R.device)
    bits_RV = _shifted(_mixed(key_R[:, None] + token_V[None, :]), 64 - UNIFORM_BITS)
    return (bits_RV.double() + 0.5) * 2.0**-UNIFORM_BITS


def _mixed(number: torch.Tensor) -> torch.Tensor:
    """The next number of SplitMix64's sequence in 64 bits, in which products wrap around."""
    number = number * STEP + STEP
    number = (number ^ _shifted(number, 30)) * FIRST
    number = (number ^ _shifted(number, 27)) * SECOND
    return number ^ _shifted(number, 31)


def _shifted(number: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filled with zeros."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def _seeds(requests: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    given = [
        (row, seed) for row, each in enumerate(requests) if (seed := each.sampling_params.sampling_seed) is not None
    ]
    if not given:
        return None
    rows, seeds = zip(*given, strict=True)
    return torch.tensor(rows, device=device), torch.tensor(seeds, dtype=torch.int64, device=device)
