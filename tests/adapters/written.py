"""Writes small adapters for a checkpoint, by hand and in any format, and applies one to transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.importer import Imported

Array = npt.NDArray[np.float32]
PROJECTIONS = ("gate", "up", "down")


def expert_shape(base: Checkpoint, projection: str) -> tuple[int, int]:
    """(out, in)."""
    wide = (base.moe_intermediate_size, base.hidden_size)
    return wide[::-1] if projection == "down" else wide


class Factors:
    """Random A and B, the same for the same seed."""

    def __init__(self, seed: int, size: float = 0.3) -> None:
        self.rng = np.random.default_rng(seed)
        self.size = size

    def pair(self, out: int, inside: int, rank: int) -> tuple[Array, Array]:
        a = self.rng.normal(0, inside**-0.5, (rank, inside)).astype(np.float32)
        b = self.rng.normal(0, self.size, (out, rank)).astype(np.float32)
        return a, b


def write_config(folder: Path, **changes: Any) -> None:
    """adapter_config.json of rank 4 and alpha 8."""
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content))


def modules_of(checkpoint: Path, ends: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Linear modules of a checkpoint whose names end so: name -> (out, in). A tied head is one."""
    base = read_checkpoint(checkpoint)
    tensors = {**base.tensors, **{name: base.tensors[other] for name, other in base.stand_ins.items()}}
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.removesuffix(".weight").endswith(tuple(ends))
    }


def write_per_expert(
    folder: Path,
    checkpoint: Path,
    ends: Iterable[str],
    *,
    seed: int = 0,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    size: float = 0.3,
    **config: Any,
) -> Path:
    """Format A on every module whose name ends so. ranks: by the last part of the name, as rank_pattern has it."""
    factors, tensors = Factors(seed, size), {}
    for name, (out, inside) in modules_of(checkpoint, ends).items():
        if name.endswith("embed_tokens"):
            a, b = factors.pair(inside, out, rank)
            (
                tensors[f"base_model.model.{name}.lora_embedding_A"],
                tensors[f"base_model.model.{name}.lora_embedding_B"],
            ) = a, b
            continue
        a, b = factors.pair(out, inside, (ranks or {}).get(name.rpartition(".")[2], rank))
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    targets = sorted({end.rpartition(".")[2] for end in ends})
    write_config(folder, r=rank, rank_pattern=dict(ranks or {}), target_modules=targets, **config)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def write_fused(
    folder: Path, checkpoint: Path, *, seed: int = 0, rank: int = 4, size: float = 0.3, old: bool = False, **config: Any
) -> Path:
    """Format B on all experts, in the layout of peft 0.21 or of 0.18."""
    base, factors, tensors = read_checkpoint(checkpoint), Factors(seed, size), {}
    for layer in base.moe_layers:
        for name, out, inside in (
            ("experts.base_layer", 2 * base.moe_intermediate_size, base.hidden_size),
            ("experts", base.hidden_size, base.moe_intermediate_size),
        ):
            rows, columns = (inside, out) if not old else (out, inside)
            a, b = factors.pair(columns, rows, rank * base.num_experts)
            tensors[f"base_model.model.model.layers.{layer}.mlp.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.model.layers.{layer}.mlp.{name}.lora_B.weight"] = b
    version = "0.18.1" if old else "0.21.2"
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    write_config(folder, r=rank, target_modules=[], target_parameters=targets, peft_version=version, **config)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}
"""What Unsloth leaves in adapter_config.json, beside the order of B's columns since September 2026."""


def write_grouped(folder: Path, checkpoint: Path, *, rank: int = 4, declared: bool = True, **options: Any) -> Path:
    """Format B as Unsloth wrote it: B's columns run (expert, rank). Else it is write_fused's adapter of that seed."""
    said = {"lora_B_layout": "grouped_by_expert"} if declared else {}
    write_fused(folder, checkpoint, rank=rank, **UNSLOTH, **said, **options)
    regroup(folder, rank)
    return folder


def regroup(folder: Path, rank: int) -> None:
    """The columns of every fused B from (rank, expert) to (expert, rank)."""
    file = str(folder / "adapter_model.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            by_rank = tensor.reshape(tensor.shape[0], rank, -1)
            tensors[name] = np.ascontiguousarray(by_rank.swapaxes(1, 2).reshape(tensor.shape))
    save_file(tensors, file)


def write_stacked(
    folder: Path, checkpoint: Path, *, seed: int = 0, rank: int = 4, size: float = 0.3, shared: bool = True
) -> Path:
    """Format E on all experts, as Tinker writes it. shared: one outer factor for all, A of w1 and w3, B of w2."""
    base, factors, tensors = read_checkpoint(checkpoint), Factors(seed, size), {}
    for layer in base.moe_layers:
        for name, projection in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            pairs = [factors.pair(*expert_shape(base, projection), rank) for _ in range(base.num_experts)]
            a, b = np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])
            if shared:
                a, b = (a, b[:1]) if name == "w2" else (a[:1], b)
            stem = f"base_model.model.model.layers.{layer}.mlp.experts.{name}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
    write_config(folder, r=rank, target_modules="all-linear")
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def split_into_shards(folder: Path, shards: int = 2) -> Path:
    """The adapter's one file as several, with an index."""
    whole = folder / "adapter_model.safetensors"
    tensors, places = load_file(str(whole)), {}
    for number in range(shards):
        name = f"adapter_model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, str(folder / name))
        places.update(dict.fromkeys(part, name))
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole.unlink()
    return folder


def write_wrapped(folder: Path, checkpoint: Path, ends: Iterable[str], **options: Any) -> Path:
    """Format A with names as FSDP and activation checkpointing leave them, split into shards."""
    write_per_expert(folder, checkpoint, ends, **options)
    file = str(folder / "adapter_model.safetensors")
    wrapped = {
        f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(wrapped, file)
    return split_into_shards(folder)


def write_converted(folder: Path, checkpoint: Path, *, seed: int = 0, rank: int = 4, size: float = 0.3) -> Path:
    """Format C on all experts: asked for gate, up and down, PEFT wrote gate_up_proj with twice the rank and alpha."""
    base, factors, tensors = read_checkpoint(checkpoint), Factors(seed, size), {}
    for layer in base.moe_layers:
        for name, out, inside, own_rank in (
            ("experts.base_layer", 2 * base.moe_intermediate_size, base.hidden_size, 2 * rank),
            ("experts", base.hidden_size, base.moe_intermediate_size, rank),
        ):
            a, b = factors.pair(out, inside, own_rank * base.num_experts)
            tensors[f"base_model.model.model.layers.{layer}.mlp.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.model.layers.{layer}.mlp.{name}.lora_B.weight"] = b
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 2 * rank}, "alpha_pattern": {r".*\.gate_up_proj": 4 * rank}}
    targets: dict[str, Any] = {"target_modules": [], "target_parameters": ["down_proj", "gate_up_proj"]}
    write_config(folder, r=rank, lora_alpha=2 * rank, peft_version="0.21.2", **targets, **patterns)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


def write_kt_training(folder: Path, checkpoint: Path, *, seed: int = 0, rank: int = 4, size: float = 0.3) -> Path:
    """Format D: experts stacked, beside PEFT's file for the attention's output."""
    base, factors, tensors = read_checkpoint(checkpoint), Factors(seed, size), {}
    write_per_expert(folder, checkpoint, [".o_proj"], seed=seed + 1, rank=rank, size=size)
    for layer in base.moe_layers:
        for projection in PROJECTIONS:
            pairs = [factors.pair(*expert_shape(base, projection), rank) for _ in range(base.num_experts)]
            stem = f"layers.{layer}.experts.{projection}_lora"
            tensors[f"{stem}_a"] = np.stack([a for a, _ in pairs])
            tensors[f"{stem}_b"] = np.stack([b for _, b in pairs])
    save_file(tensors, str(folder / "fused_expert_lora.safetensors"))
    return folder


def add_to_model(model: Any, imported: Imported) -> None:
    """W += ΔW in a transformers 5 model, experts fused as it keeps them."""
    import torch

    weights = dict(model.named_parameters())
    for pair in imported.pairs.values():
        delta, target = torch.from_numpy(pair.delta()), pair.target
        with torch.no_grad():
            if target.kind != "routed_experts":
                weights[f"model.{target.module}.weight"] += delta
                continue
            stem = f"model.layers.{target.layer}.mlp.experts"
            if target.projection == "down":
                weights[f"{stem}.down_proj"][target.expert] += delta
            else:
                half = weights[f"{stem}.gate_up_proj"][target.expert].chunk(2)[target.projection == "up"]
                half += delta
