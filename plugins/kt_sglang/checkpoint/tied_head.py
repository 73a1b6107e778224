"""Checkpoints whose output head is tied to the embedding: the one stored matrix is loaded into both.

Trigger: SGLang's Qwen2-MoE, Qwen3-MoE, Mixtral and GLM-4-MoE give the head a matrix of its own, which is never filled
if config.json says tie_word_embeddings and lm_head.weight is not stored; its DeepSeek shares the module, and ignores a
stored head with other values. Safe because both hold what transformers would use: the stored matrix in both if only one
is stored, and both stored ones if there are two. It is loaded like any other weight, so ranks, pipeline stages and LoRA
wrappers find an ordinary head; the price is a second copy in memory. Remove when SGLang ties the heads of these
families and unties a head that is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kt_sglang.moe.served_checkpoint import served_checkpoint

Weights = Iterable[tuple[str, torch.Tensor]]


def before_initialize_model(model_config: Any, *_: Any, **__: Any) -> None:
    """BEFORE hook of `loader._initialize_model`: every family's head gets a matrix of its own."""
    if not model_config.is_draft_model and getattr(model_config.hf_config, "tie_word_embeddings", False):
        model_config.hf_config.tie_word_embeddings = False


def around_get_weights_iterator(
    original: Callable[..., Weights], loader: Any, source: Any, *arguments: Any, **options: Any
) -> Weights:
    """AROUND hook of `DefaultModelLoader._get_weights_iterator`: adds a weight if one stands for two."""
    weights, base = original(loader, source, *arguments, **options), served_checkpoint()
    if Path(source.model_or_path).resolve() != base.path.resolve() or not base.stand_ins:
        return weights
    return with_stand_ins(weights, base.stand_ins)


def with_stand_ins(weights: Weights, stand_ins: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all, and each tensor that stands for another under that name too."""
    absent_of = {stored: absent for absent, stored in stand_ins.items()}
    for name, tensor in weights:
        yield name, tensor
        if name in absent_of:
            yield absent_of[name], tensor
