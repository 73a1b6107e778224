"""Checkpoints whose output head is their embedding: the one stored matrix is loaded into both places.

Trigger: SGLang's Qwen2-MoE, Qwen3-MoE, Mixtral and GLM-4-MoE give the head a matrix of its own, which nobody fills
where config.json says tie_word_embeddings and lm_head.weight is not stored; its DeepSeek shares the module, and leaves
a stored head of other values unread. Safe because both places hold what transformers would compute with: the stored
matrix in each where only one is stored, and both stored ones where there are two. It is loaded as any other weight,
so ranks, pipeline stages and LoRA wrappers find an ordinary head; the price is a second copy in memory. Remove when
SGLang ties the heads of these families and unties a head that is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kt_sglang.served_checkpoint import served_checkpoint

Weights = Iterable[tuple[str, torch.Tensor]]


def before_initialize_model(model_config: Any, *_: Any, **__: Any) -> None:
    """BEFORE hook of `loader._initialize_model`: the head gets a matrix of its own in every family."""
    if not model_config.is_draft_model and getattr(model_config.hf_config, "tie_word_embeddings", False):
        model_config.hf_config.tie_word_embeddings = False


def around_get_weights_iterator(
    original: Callable[..., Weights], loader: Any, source: Any, *arguments: Any, **options: Any
) -> Weights:
    """AROUND hook of `DefaultModelLoader._get_weights_iterator`: one more weight, where one stands for two."""
    weights, base = original(loader, source, *arguments, **options), served_checkpoint()
    if Path(source.model_or_path).resolve() != base.path.resolve() or not base.stand_ins:
        return weights
    return with_stand_ins(weights, base.stand_ins)


def with_stand_ins(weights: Weights, stand_ins: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all, and each one that stands for another under that name too."""
    absent_of = {stored: absent for absent, stored in stand_ins.items()}
    for name, tensor in weights:
        yield name, tensor
        if name in absent_of:
            yield absent_of[name], tensor
