"""Penalties of requests in one batch, against their definition: with SGLang's own counters, and the device's newest
token known or not.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_sglang.sampling.penalties import (
    after_copy_for_forward,
    after_from_schedule_batch,
    around_cumulate,
    around_sample,
)
from kt_sglang.without_gpu import torchvision_shim

VOCABULARY, PROMPT = 7, [6, 6, 5]
ASKED: tuple[dict[str, float], ...] = (
    {"frequency_penalty": 0.5, "presence_penalty": -0.5},
    {},
    {"repetition_penalty": 1.5, "presence_penalty": 1.0, "min_new_tokens": 3},
)
ANSWERS = ([1, 1, 2, 1, 3], [0, 0, 0, 0, 0], [4, 2, 4, 4, 2])
END = 3


def request(asked: dict[str, float]) -> Any:
    from sglang.srt.sampling.sampling_params import SamplingParams

    made = SimpleNamespace(sampling_params=SamplingParams(**asked), origin_input_ids=PROMPT, output_ids=[])
    made.eos_token_ids, made.tokenizer = {END}, SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END)
    return made


def batch_of(requests: list[Any]) -> Any:
    """A batch whose prompts, and what there is of answers, have been read."""
    from sglang.srt.sampling import penaltylib

    lengths = [len(each.origin_input_ids) + len(each.output_ids) for each in requests]
    batch = SimpleNamespace(reqs=requests, device="cpu", seq_lens_cpu=torch.tensor(lengths))
    batch.spec_algorithm = SimpleNamespace(is_none=lambda: True)
    batch.forward_mode = SimpleNamespace(is_decode=lambda: True)
    batch.kept = Weakly(batch)
    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    made = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, batch.kept, kinds)
    info = SimpleNamespace(penalizer_orchestrator=made, temperatures=torch.ones(len(requests)), vocab_size=VOCABULARY)
    batch.sampling_info = after_from_schedule_batch(info, None, batch)
    return batch


class Weakly:
    """What SGLang's penalties hold a weak reference to, which a SimpleNamespace cannot be of."""

    def __init__(self, batch: Any) -> None:
        self.reqs, self.device = batch.reqs, batch.device


def logits_of_a_step(batch: Any, newest: list[int]) -> torch.Tensor:
    """(B, V): what a step of decoding makes of logits that are all 3."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    around_cumulate(lambda _: pytest.fail("left to SGLang"), batch)
    batch.seq_lens_cpu = batch.seq_lens_cpu + 1
    SamplingBatchInfo.update_penalties(batch.sampling_info)
    step = SimpleNamespace(**vars(batch.sampling_info))
    step = after_copy_for_forward(step, batch.sampling_info)
    made = torch.full((len(batch.reqs), VOCABULARY), 3.0)
    forward = SimpleNamespace(
        sampling_info=step, forward_mode=batch.forward_mode, input_ids=torch.tensor(newest, dtype=torch.int32)
    )

    def sample(*_: Any) -> None:
        made.add_(step.acc_additive_penalties).div_(step.acc_scaling_penalties)

    around_sample(sample, None, None, forward)
    return made


def expected(asked: dict[str, float], answer: list[int]) -> torch.Tensor:
    """(V,) by definition, https://platform.openai.com/docs/api-reference; repetition as in CTRL, section 4.1."""
    made, least = torch.full((VOCABULARY,), 3.0), asked.get("min_new_tokens", 0)
    for token, times in Counter(answer).items():
        made[token] -= times * asked.get("frequency_penalty", 0.0) + asked.get("presence_penalty", 0.0)
        made[token] /= asked.get("repetition_penalty", 1.0)
    if len(answer) < least:
        made[END] = -torch.inf
    return made


@pytest.mark.parametrize("late", [True, False], ids=["the newest token is on the device", "it is known"])
def test_each_step_counts_all_tokens_of_the_answer(late: bool) -> None:
    torchvision_shim.install_if_needed()
    requests = [request(asked) for asked in ASKED]
    batch = batch_of(requests)
    for step in range(1, len(ANSWERS[0])):
        for each, answer in zip(requests, ANSWERS, strict=True):
            each.output_ids = answer[: step - late]
        found = logits_of_a_step(batch, [answer[step - 1] for answer in ANSWERS])
        for row, (asked, answer) in enumerate(zip(ASKED, ANSWERS, strict=True)):
            torch.testing.assert_close(found[row], expected(asked, answer[:step]))


def test_a_request_that_comes_back_has_its_answer_counted() -> None:
    torchvision_shim.install_if_needed()
    requests = [request(asked) for asked in ASKED]
    for each, answer in zip(requests, ANSWERS, strict=True):
        each.output_ids = answer[:3]
    batch = batch_of(requests)
    found = logits_of_a_step(batch, [answer[3] for answer in ANSWERS])
    for row, (asked, answer) in enumerate(zip(ASKED, ANSWERS, strict=True)):
        torch.testing.assert_close(found[row], expected(asked, answer[:4]))


def test_speculative_decoding_is_left_to_sglang() -> None:
    torchvision_shim.install_if_needed()
    batch = batch_of([request(ASKED[0])])
    called: list[Any] = []
    batch.spec_algorithm = SimpleNamespace(is_none=lambda: False)
    around_cumulate(called.append, batch)
    assert called == [batch]
