"""Which tokens end an answer, by the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import DeepseekV2Config, GenerationConfig

from kt_sglang.sampling.ends import after_get_hf_eos_token_id
from kt_sglang.without_gpu import torchvision_shim


def ends(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> set[int] | None:
    """What SGLang takes for them, with our hook behind it."""
    torchvision_shim.install_if_needed()
    from sglang.srt.configs.model_config import ModelConfig

    (folder / "config.json").write_text(json.dumps(config))
    read = GenerationConfig(**generation) if generation is not None else None
    model = SimpleNamespace(hf_config=DeepseekV2Config(**config), hf_generation_config=read, model_path=str(folder))
    return after_get_hf_eos_token_id(ModelConfig._get_hf_eos_token_id(model), model)


DEFAULT = 2
"""What transformers' class has where config.json names none."""


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {"eos_token_id": [5, 9]}, {5, 9}),
        ({}, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 9]}, {5, 7, 9}),
        ({"eos_token_id": [7, 8]}, {}, {7, 8}),
        ({"eos_token_id": [7, 8]}, None, {7, 8}),
        ({}, None, {DEFAULT}),
        ({"eos_token_id": None}, {"eos_token_id": 5}, {5}),
    ],
)
def test_ends_are_those_that_the_files_name(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: set[int], tmp_path: Path
) -> None:
    assert ends(tmp_path, config, generation) == expected
