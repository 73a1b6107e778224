"""Checkpoints and adapters as small as they can be while every header, name and shape in them is real."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kt_model.families import FAMILIES, expert_weights, moe_layers

DEEPSEEK = {"moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy"}
HIDDEN, INNER, EXPERTS, LAYERS, RANK, VOCABULARY = 32, 16, 4, 3, 2, 8


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json of one family."""
    row = FAMILIES[family]
    content: dict[str, Any] = {
        "model_type": family,
        "architectures": ["TinyForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 512,
        row.experts_key: EXPERTS,
        row.intermediate_key: INNER,
        row.top_k_key: 2,
    }
    if row.first_dense_key:
        content[row.first_dense_key] = 1
    if row.latent_cache:
        content |= DEEPSEEK
    return content | changes


def write_checkpoint(
    folder: Path, family: str = "deepseek_v2", leave_out: Collection[str] = (), **changes: Any
) -> Path:
    """A checkpoint with nothing in it but embedding, last norm and head, in each layer one attention weight, a norm and
    routed experts with their router, or a dense weight; leave_out: tensors that it has not."""
    folder.mkdir(parents=True)
    content = config_of(family, **changes)
    (folder / "config.json").write_text(json.dumps(content))
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    with_experts = moe_layers(FAMILIES[family], content)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        if layer not in with_experts:
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
            continue
        mlp = "block_sparse_moe" if family == "mixtral" else "mlp"
        tensors[f"model.layers.{layer}.{mlp}.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            tensors.update(zip(expert_weights(FAMILIES[family], layer, expert), shapes, strict=True))
    kept = {name: np.zeros(shape, np.float16) for name, shape in tensors.items() if name not in leave_out}
    save_file(kept, folder / "model.safetensors")
    return folder


def adapter_tensors(family: str = "deepseek_v2", layers: tuple[int, ...] = (1, 2), rank: int = RANK) -> dict[str, Any]:
    """PEFT's names and shapes for low-rank pairs on every routed expert of some layers."""
    tensors = {}
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    for layer in layers:
        for expert in range(EXPERTS):
            for name, (rows, columns) in zip(expert_weights(FAMILIES[family], layer, expert), shapes, strict=True):
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = np.ones((rank, columns), np.float32)
                tensors[f"{module}.lora_B.weight"] = np.ones((rows, rank), np.float32)
    return tensors


def fused_tensors(layers: tuple[int, ...] = (1, 2), rank: int = RANK) -> dict[str, Any]:
    """The same as PEFT writes it for experts that are one parameter: gate_up_proj as base_layer, and down_proj."""
    tensors = {}
    for layer in layers:
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, rows, columns in ((f"{stem}.base_layer", 2 * INNER, HIDDEN), (stem, HIDDEN, INNER)):
            tensors[f"{name}.lora_A.weight"] = np.ones((EXPERTS * rank, columns), np.float32)
            tensors[f"{name}.lora_B.weight"] = np.ones((rows, rank * EXPERTS), np.float32)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An adapter as PEFT's save_pretrained writes it."""
    folder.mkdir(parents=True)
    content = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(content | changes))
    save_file(adapter_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
