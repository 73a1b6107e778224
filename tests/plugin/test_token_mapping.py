"""Neighbouring requests of one adapter that torch_native joins to one segment longer than any of them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from kt_sglang.without_gpu import token_mapping, torchvision_shim

torchvision_shim.install_if_needed()
TWO_PROMPTS = 2 * 130


def arguments(max_len: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, None, None, int]:
    """Two prompts of 130 tokens for the adapter in slot 1, joined, then one of 40 for slot 0."""
    ends, slots = torch.tensor([0, TWO_PROMPTS, TWO_PROMPTS + 40]), torch.tensor([1, 0])
    return TWO_PROMPTS + 40, ends.int(), torch.tensor([8, 8]).int(), slots.int(), None, None, max_len


def test_stock_sglang_still_stops_there() -> None:
    from sglang.srt.lora.backend.base_backend import _compute_moe_lora_info

    number, ends, ranks, slots, *_ = arguments(130)
    with pytest.raises(AssertionError, match="under-covers tokens"):
        _compute_moe_lora_info(number * 2, ends * 2, ranks, slots, None, None, 130)


def test_joined_prompts_map_to_their_adapter() -> None:
    from sglang.srt.lora.backend.base_backend import _compute_moe_lora_info

    enabled, mapping = token_mapping.around_compute_moe_lora_info(_compute_moe_lora_info, *arguments(130))
    assert mapping.tolist() == [1] * TWO_PROMPTS + [0] * 40
    assert enabled.tolist() == [1, 1]
    number, ends, ranks, slots, *_ = arguments(130)
    twice = (number * 2, ends * 2, ranks, slots, None, None, 130)
    _, mapping = token_mapping.around_compute_moe_lora_info(_compute_moe_lora_info, *twice)
    assert mapping.tolist() == [1] * (2 * TWO_PROMPTS) + [0] * 80


def test_the_hook_names_the_parameters_that_sglang_has() -> None:
    from sglang.srt.lora.backend.base_backend import _compute_moe_lora_info

    ours = list(inspect.signature(token_mapping.around_compute_moe_lora_info).parameters)[1:-1]
    theirs = list(inspect.signature(_compute_moe_lora_info).parameters)
    assert theirs[: len(ours)] == ours


def test_the_slots_of_a_batch_are_found_once_for_all_of_its_layers() -> None:
    """And anew for the next one, in whatever object SGLang describes it."""
    from kt_sglang.adapters.lora import BatchSlots

    ranks, tokens = torch.tensor([0, 8]), torch.tensor([1, 0, -1, 1])
    slots, batch = BatchSlots(), SimpleNamespace(lora_ranks=ranks)
    first = slots.of(batch, tokens, 1)
    assert first.tolist() == [1, -1, -1, 1] and slots.of(batch, tokens, 2) is first
    tokens[1] = 1  # the same object, filled again, from its first layer on
    assert slots.of(batch, tokens, 1).tolist() == [1, 1, -1, 1]
    other = SimpleNamespace(lora_ranks=ranks)
    assert slots.of(other, tokens[:2], 5).tolist() == [1, 1]
    ranks[1] = 0
    assert slots.of(other, tokens[:2], 5).tolist() == [-1, -1], "a model of one layer"
