"""Bases of the fixtures: whole checkpoints of random weights, one a family and shape, saved by transformers; and what a
server with adapters has to answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from served_adapters import Logprobs, Served, logprobs_of_merged

from kt_model.checkpoint import Checkpoint, read_checkpoint

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Checkpoint]:
    """The checkpoint that a fixture was trained on."""
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def build(text: str) -> Checkpoint:
        return read_checkpoint(_save(json.loads(text), root / str(abs(hash(text)))))

    return lambda fixture: build((fixture / "base.json").read_text())


@pytest.fixture(scope="module")
def merged_logprobs(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Logprobs:
    """What the module's server has to answer."""
    return logprobs_of_merged(served.checkpoint, served.adapters, tmp_path_factory.mktemp("merged"))


def _save(content: dict[str, object], folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(str(content.pop("model_type")), **content)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
