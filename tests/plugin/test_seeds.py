"""Sampling by the seed of a request: what is chosen, without a server. What clients see is shown by
tests/edge/test_served.py.
"""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_sglang.edge import seeds as edge_seeds
from kt_sglang.sampling import seeds
from kt_sglang.without_gpu import torchvision_shim

PROBS = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
FILTERS = {"none": (1 << 30, 1.0, 0.0), "top_k": (3, 1.0, 0.0), "top_p": (1 << 30, 0.6, 0.0),
           "min_p": (1 << 30, 1.0, 0.3),
           "all": (4, 0.9, 0.2), "greedy": (1, 1.0, 0.0)}  # fmt: skip
WRAP = (1 << 64) - 1


def columns(values: tuple[int, float, float], rows: int) -> seeds.Filters:
    top_k, top_p, min_p = values
    return seeds.Filters(torch.full((rows,), top_k), torch.full((rows,), top_p), torch.full((rows,), min_p))


def filtered_by_sglang(filters: tuple[int, float, float]) -> list[float]:
    """The weights that SGLang's own sampler leaves, in the order of the tokens."""
    torchvision_shim.install_if_needed()
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch as sampled

    probs = torch.tensor([PROBS])
    _, kept, order, _ = sampled(probs, *columns(filters, 1), True, None, None, return_filtered_probs=True)
    weights: list[float] = torch.zeros_like(probs).scatter_(1, order.long(), kept)[0].tolist()
    return weights


@pytest.mark.parametrize("filters", FILTERS.values(), ids=list(FILTERS))
def test_tokens_come_as_often_as_sglangs_filters_leave_them_likely(filters: tuple[int, float, float]) -> None:
    rows, kept = 20_000, filtered_by_sglang(filters)
    probs = torch.tensor(PROBS).expand(rows, -1)
    assert seeds.filtered(probs[:1], columns(filters, 1))[0].tolist() == kept
    left = seeds.filtered(probs, columns(filters, rows))
    chosen = seeds.sample(left, torch.full((rows,), -7), torch.arange(rows))
    counts = torch.bincount(chosen, minlength=len(PROBS)).tolist()
    for count, weight in zip(counts, kept, strict=True):
        share = weight / sum(kept)
        assert abs(count - rows * share) <= 5 * math.sqrt(rows * share * (1 - share)), (counts, kept)


def test_seeds_and_positions_are_independent_of_each_other() -> None:
    """A seed's numbers are not those of the next one, shifted by a position or a token."""
    numbers = seeds.uniforms(torch.arange(-8, 8).repeat_interleave(16), torch.arange(16).repeat(16), 64)
    assert len(numbers.unique()) == numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 5 / math.sqrt(12 * numbers.numel())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_numbers_are_splitmix64s_whatever_the_device_does_with_signs(seed: int) -> None:
    def mixed(number: int) -> int:
        number = ((number + 1) * 0x9E3779B97F4A7C15) & WRAP
        number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & WRAP
        number = ((number ^ number >> 27) * 0x94D049BB133111EB) & WRAP
        return number ^ number >> 31

    key = mixed(mixed(seed & WRAP) + 5 & WRAP)
    expected = [((mixed(key + token & WRAP) >> 12) + 0.5) / 2**52 for token in range(40)]
    assert seeds.uniforms(torch.tensor([seed]), torch.tensor([5]), 40)[0].tolist() == expected


def test_a_filter_of_another_row_changes_nothing_in_a_row_without_one() -> None:
    """Though the probabilities of many tokens sum up to more than 1."""
    probs = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(1)).pow(8)
    probs = probs / probs.sum(dim=-1, keepdim=True) * 1.0001
    own = seeds.Filters(torch.tensor([1 << 30, 5]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.1]))
    left = seeds.filtered(probs, own)
    assert left[0].equal(probs[0]) and 1 <= int(left[1].count_nonzero()) <= 5


def batch(given: list[int | None]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """SGLang's information of a batch, probabilities and positions of its rows, which depend on the seed alone."""
    requests = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in given]
    info = SimpleNamespace(**columns(FILTERS["all"], len(given))._asdict(), sampling_seed=None)
    info.temperatures = torch.ones(len(given), 1)
    seeds.after_init_new(SimpleNamespace(sampling_info=info), None, SimpleNamespace(reqs=requests))
    rows = [torch.randn(50, generator=torch.Generator().manual_seed(seed or 0)).softmax(0) for seed in given]
    return info, torch.stack(rows), torch.tensor([10 + (seed or 0) for seed in given])


def test_a_seed_chooses_the_same_beside_any_others_and_nothing_for_them() -> None:
    def own(given: list[int | None]) -> dict[int | None, int]:
        info, probs, positions = batch(given)
        ordinary = torch.full((len(given),), 49, dtype=torch.int32)
        tokens, noted = seeds.around_sample_from_probs(lambda *_: (ordinary, None), None, probs, info, positions, False)
        assert (tokens.dtype, noted) == (torch.int32, None)
        return dict(zip(given, tokens.tolist(), strict=True))

    alone = {seed: own([seed])[seed] for seed in range(6)}
    assert len(set(alone.values())) > 2
    assert own([None, 3, 0, None, 5]) == {None: 49, 3: alone[3], 0: alone[0], 5: alone[5]}
    assert own([None, None]) == {None: 49}


def test_several_answers_have_seeds_of_their_own_and_the_first_one_the_requests() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.sampling.sampling_params import SamplingParams

    sent: list[int | None] = []

    async def send(manager: None, request: Any) -> None:
        sent.append(request.sampling_params.sampling_seed)

    async def handle(manager: None, prompts: list[SamplingParams]) -> Any:
        for given in prompts:
            for _ in range(given.n):
                await edge_seeds.around_send_one_request(send, None, SimpleNamespace(sampling_params=given))
        yield sent

    async def answer(*prompts: SamplingParams) -> list[int | None]:
        sent.clear()
        answers = edge_seeds.around_handle_batch_request(handle, None, [*prompts])
        return list(await anext(answers))

    last = 2**63 - 1
    three = asyncio.run(answer(SamplingParams(n=3, sampling_seed=last), SamplingParams(n=3, sampling_seed=last)))
    assert (three[0], three[:3], len(set(three))) == (last, three[3:], 3)
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in three)
    assert asyncio.run(answer(SamplingParams(n=2), SamplingParams(n=1, sampling_seed=4))) == [None, None, 4]
