"""Small checkpoints of random weights, in any type and number of shards, adapters on them, and how a command ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_files
import torch
from dying import RENAMING, dying_at
from launching import LONG_S
from safetensors.torch import load_file, save_file

from kt_model.families import FAMILIES, expert_weights, moe_layers

HIDDEN, INNER = 96, 64
EXPERTS, LAYERS = tiny_files.EXPERTS, tiny_files.LAYERS
KT_LAUNCH = Path(sys.executable).with_name("kt-launch")


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """As tiny_files has it, in sizes that quantized experts can have."""
    sizes = {"hidden_size": HIDDEN, FAMILIES[family].intermediate_key: INNER}
    return tiny_files.config_of(family, **(sizes | changes))


def weights_of(content: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32: routed experts, one attention weight a layer, embedding, last norm and head."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    family, hidden = FAMILIES[content["model_type"]], content["hidden_size"]
    inner, experts = content[family.intermediate_key], content[family.experts_key]
    for layer in range(content["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.randn(hidden, hidden, generator=rng) * 0.05
    for layer in moe_layers(family, content):
        for expert in range(experts):
            for name, shape in zip(
                expert_weights(family, layer, expert), ((inner, hidden),) * 2 + ((hidden, inner),), strict=True
            ):
                tensors[name] = torch.randn(*shape, generator=rng) * 0.05
    for name, outside in (("model.embed_tokens", (8, hidden)), ("model.norm", (hidden,)), ("lm_head", (8, hidden))):
        tensors[f"{name}.weight"] = torch.randn(*outside, generator=rng) * 0.05
    return tensors


def write_checkpoint(
    folder: Path,
    family: str = "deepseek_v2",
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    **changes: Any,
) -> Path:
    folder.mkdir(parents=True)
    content = config_of(family, **changes)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text("{}")
    tensors = {name: tensor.to(dtype) for name, tensor in weights_of(content, seed).items()}
    names = sorted(tensors)
    places = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_adapter(folder: Path, checkpoint: Path, rank: int = 2, **changes: Any) -> Path:
    """Format A on every routed expert and o_proj."""
    from kt_model.checkpoint import read_checkpoint

    rng, tensors = np.random.default_rng(1), {}
    for name, tensor in read_checkpoint(checkpoint, float8=True).tensors.items():
        if (".experts." in name and name.endswith(".weight")) or "o_proj" in name:
            out, inside = tensor.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.from_numpy(rng.normal(0, 0.1, (rank, inside)).astype("f"))
            tensors[f"{module}.lora_B.weight"] = torch.from_numpy(rng.normal(0, 0.1, (out, rank)).astype("f"))
    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": ["gate_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@dataclass
class Ended:
    """How the command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to show that nothing was written or changed."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def write_kt_kernel_folder(folder: Path, pools: int = 2) -> Path:
    """What kt-kernel's converter leaves: quantized experts for its own tiles, cut for so many NUMA pools."""
    folder.mkdir(parents=True)
    parts = [(projection, pool) for projection in ("gate", "up", "down") for pool in range(pools)]
    names = [f"blk.1.ffn_{part}_exps.0.numa.{pool}.{kind}" for part, pool in parts for kind in ("weight", "scale")]
    save_file({name: torch.zeros(4, dtype=torch.uint8) for name in names}, folder / "model-00001-of-00001.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def write_float8(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as DeepSeek-V3 ships them: experts in float8 with a scale a block of 32 x 40, tails included."""
    write_checkpoint(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 40]})
    file = folder / "model-00001-of-00001.safetensors"
    tensors, exact = load_file(file), {}
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors[name].float()
        rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // 40)
        scales = torch.rand(rows, columns) * 0.01 + 0.001
        spread = scales.repeat_interleave(32, 0)[: weight.shape[0]].repeat_interleave(40, 1)[:, : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        exact[name] = tensors[name].float() * spread
    save_file(tensors, file)
    return folder, exact


def kill_half_way(words: Sequence[str], cache: Path, partial: Path) -> None:
    """kt-launch with these words, by SIGKILL just before the ninth file of the folder that it fills gets its name."""
    dying = dying_at(RENAMING, 9, partial, partial.with_name("armed"))
    env = {**os.environ, "KT_LAUNCH_CACHE": str(cache), **dying}
    done = subprocess.run([str(KT_LAUNCH), *words], env=env, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == -signal.SIGKILL, done.stderr
