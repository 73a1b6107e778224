"""Bases of the fixtures: whole checkpoints of random weights, one a family and shape, saved by transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

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


def _save(content: dict[str, object], folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(str(content.pop("model_type")), **content)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
