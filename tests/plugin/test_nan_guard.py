"""Which rows of logits end their request, and how that comes to the host under overlapped scheduling: with classes of
SGLang and without a server. What clients see is shown on one by tests/edge/test_served.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_sglang.edge.nan_answers import has_nan
from kt_sglang.sampling import nan_guard
from kt_sglang.without_gpu import torchvision_shim

INF = math.inf
ROWS = {
    "ordinary": ([0.5, -3.0, 2.0], 0),
    "tokens forbidden": ([-INF, -3.0, -INF], 0),
    "very large": ([3e38, -3e38, 0.0], 0),
    "NaN": ([0.5, math.nan, 2.0], 1),
    "infinite": ([0.5, INF, 2.0], 1),
    "no token left": ([-INF, -INF, -INF], nan_guard.FORBIDDEN),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_no_token_can_be_chosen(dtype: torch.dtype) -> None:
    logits = torch.tensor([row for row, _ in ROWS.values()], dtype=dtype)
    assert dict(zip(ROWS, nan_guard.unusable_rows(logits).tolist(), strict=True)) == {
        name: unusable for name, (_, unusable) in ROWS.items()
    }


def test_tokens_are_sampled_from_all_rows_beside_filters() -> None:
    """torch draws nothing from a batch in which one row has NaN."""
    torchvision_shim.install_if_needed()
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    def sample(sampler: None, output: Any) -> list[int]:
        probs, count = output.next_token_logits.softmax(dim=-1), len(ROWS)
        filters = torch.full((count,), 1), torch.ones(count), torch.zeros(count)
        tokens: list[int] = top_k_top_p_min_p_sampling_from_probs_torch(probs, *filters, False, None, None).tolist()
        return tokens

    logits = torch.tensor([row for row, _ in ROWS.values()])
    usable = [row for row, (_, unusable) in enumerate(ROWS.values()) if not unusable]
    likeliest = logits[usable].argmax(dim=-1).tolist()
    tokens = nan_guard.around_sample(sample, None, output := SimpleNamespace(next_token_logits=logits))
    assert [tokens[row] for row in usable] == likeliest
    assert getattr(output, nan_guard.UNUSABLE).tolist() == [unusable for _, unusable in ROWS.values()]


def request(**changes: Any) -> Any:
    own = {"rid": "r", "beam_group": None, "is_retracted": False, "finished": lambda: False, "to_finish": None}
    return SimpleNamespace(
        **own | {"output_ids": [7, 8], "finished_len": None, "finished_reason": None} | {"grammar": None} | changes
    )


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_notes_reach_the_requests(overlapped: bool) -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.async_d2h_copy_worker import HostCopyDone
    from sglang.srt.managers.utils import GenerationBatchResult

    output = LogitsProcessorOutput(next_token_logits=torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.nan, 0.0]]))
    nan_guard.around_sample(lambda sampler, output: output.next_token_logits.nan_to_num_(), None, output)
    result = GenerationBatchResult(logits_output=output, next_token_ids=torch.tensor([1, 0, 0]))
    if overlapped:
        result.copy_done = HostCopyDone()
        nan_guard.around_copy_to_cpu(GenerationBatchResult.copy_to_cpu, result, return_logprob=False)
        result.copy_done.set_done()
        # the object may be taken for the next step, whose rows are others
        nan_guard.around_sample(lambda *_: None, None, output)
    over = request(finished=lambda: True)
    batch = SimpleNamespace(reqs=[request(), request(), over])
    nan_guard.around_process_decode(lambda *_: None, None, batch, result)
    usable, unusable, _ = batch.reqs
    assert (usable.to_finish, over.to_finish) == (None, None)
    assert (unusable.to_finish.message, int(unusable.to_finish.status_code)) == (nan_guard.MESSAGE, 500)
    assert unusable.finished_len == 2, "the token that was made up is not shown"


ANSWERS: dict[str, tuple[dict[str, Any], bool]] = {
    "text": ({"text": "a", "meta_info": {"finish_reason": None}}, False),
    "logprobs": ({"meta_info": {"input_token_logprobs": [(None, 3, None), (-0.5, 4, "a")]}}, False),
    "a prompt's": ({"meta_info": {"input_token_logprobs": [(None, 3, None), (math.nan, 4, None)]}}, True),
    "of several": ({"meta_info": {"input_top_logprobs": [None, [(-1.0, 3, None), (math.nan, 4, None)]]}}, True),
    "flat": ({"meta_info": {"output_top_logprobs_val_flat": [-1.0, math.nan]}}, True),
    "an embedding": ({"embedding": [0.5, math.nan], "meta_info": {}}, True),
    "a sparse one": ({"embedding": {3: 0.5}, "meta_info": {}}, False),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_with_nan_are_known(answer: str) -> None:
    out, bad = ANSWERS[answer]
    assert has_nan(out) is bad


def test_a_grammar_that_permits_nothing_is_the_fault_of_its_request() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    output = LogitsProcessorOutput(next_token_logits=torch.tensor([[-INF, -INF], [-INF, -INF], [math.nan, 0.0]]))
    nan_guard.around_sample(lambda *_: None, None, output)
    batch = SimpleNamespace(reqs=[request(grammar=object()), request(), request(grammar=object())])
    nan_guard.around_process_decode(lambda *_: None, None, batch, GenerationBatchResult(logits_output=output))
    assert [(each.to_finish.message, int(each.to_finish.status_code)) for each in batch.reqs] == [
        (nan_guard.NO_TOKEN, 400),
        (nan_guard.MESSAGE, 500),
        (nan_guard.MESSAGE, 500),
    ]
