"""An adapter of any layout as PEFT would have written it for fused experts, so that PEFT can say what it means.

Read here by the layouts' definitions, with nothing of the importer: E experts, r rank, A (r, in), B (out, r). The twin
has one rank R for all modules, padded with zeros, and scale 1 (B is scaled); of gate and up together A stacks both, and
B has them on its diagonal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts(\.base_layer)?")
STACKED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(w[123])")
KT = re.compile(r"(layers\.\d+)\.experts\.(gate|up|down)_lora_a")
PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
OLD = "0.18"

Factors = tuple[torch.Tensor, torch.Tensor]
Experts = dict[tuple[str, str, int], Factors]
"""(model.layers.L, gate, up or down, expert) -> A, and B scaled."""


def with_peft(model: Any, twin: Path) -> Any:
    """PEFT's model. It would take dense gate_proj and up_proj for experts' where it knows that a model type once had
    them apart; a twin needs nothing converted, so the type is unknown to it meanwhile."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(twin))
    config.inference_mode = True
    kind, model.config.model_type = model.config.model_type, "as it is"
    adapted = PeftModel(model, config, "twin")
    message = adapted.load_adapter(str(twin), "twin", is_trainable=False)
    model.config.model_type = kind
    assert [*message.unexpected_keys, *message.missing_keys] == []
    return adapted.eval()


def write_twin(adapter: Path, folder: Path, experts: int) -> Path:
    """The twin of an adapter on a model with so many experts a layer."""
    single, rest = read(adapter, experts)
    rank = 2 * max(a.shape[0] for a, _ in [*single.values(), *rest.values()])
    tensors = {}
    for name, (a, b) in rest.items():
        side = "embedding_" if name.endswith("embed_tokens") else ""
        end = "" if side else ".weight"
        tensors[f"{PREFIX}{name}.lora_{side}A{end}"] = padded(a, rank, 0)
        tensors[f"{PREFIX}{name}.lora_{side}B{end}"] = padded(b, rank, 1)
    for layer in sorted({layer for layer, _, _ in single}):
        tensors |= dict(fused_keys(layer, single, rank, experts))
    folder.mkdir(parents=True)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "adapter_model.safetensors")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if single else []
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "peft_version": "0.21.2"}
    config |= {"target_modules": sorted(rest), "target_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def fused_keys(layer: str, single: Experts, rank: int, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A (E·R, in) and B (out, R·E) of gate_up_proj and down_proj; A's rows run (expert, rank), B's columns (rank,
    expert). An expert that is not there is zero."""
    down: list[Factors] = []
    both: list[Factors] = []
    for expert in range(experts):
        gate, up, one = (single[layer, part, expert] for part in ("gate", "up", "down"))
        both.append((torch.cat([gate[0], up[0]]), torch.block_diag(gate[1], up[1])))
        down.append(one)
    for name, factors in ((".base_layer", both), ("", down)):
        a_ERi = torch.stack([padded(a, rank, 0) for a, _ in factors])
        b_EoR = torch.stack([padded(b, rank, 1) for _, b in factors])
        stem = f"{PREFIX}{layer}.mlp.experts{name}"
        yield f"{stem}.lora_A.weight", a_ERi.flatten(0, 1)
        yield f"{stem}.lora_B.weight", b_EoR.permute(1, 2, 0).flatten(1)


def padded(factor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """With zeros, up to a rank."""
    missing = list(factor.shape)
    missing[axis] = rank - factor.shape[axis]
    return torch.cat([factor, torch.zeros(missing)], dim=axis)


def read(adapter: Path, experts: int) -> tuple[Experts, dict[str, Factors]]:
    """Single experts, and every other module by its name."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in adapter.glob("*.safetensors"):
        tensors |= {without_wrappers(name): one.float() for name, one in load_file(file).items()}
    single: Experts = {}
    rest: dict[str, Factors] = {}
    for name in tensors:
        if match := KT.fullmatch(name):
            a_Eri, b_Eor = tensors[name], tensors[f"{name.removesuffix('_a')}_b"]
            scale = scale_of("", a_Eri.shape[1], config)
            single |= stacked(f"model.{match[1]}", match[2], a_Eri, b_Eor * scale, experts)
        elif ".lora_A" in name or ".lora_embedding_A" in name:
            add_module(name, tensors, config, experts, single, rest)
    return single, rest


def without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix(PREFIX)


def add_module(
    name: str, tensors: dict[str, torch.Tensor], config: Any, experts: int, single: Experts, rest: dict[str, Factors]
) -> None:
    """One module of PEFT's."""
    module = re.split(r"\.lora_(?:embedding_)?A", name)[0]
    a, b = tensors[name], tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
    if match := EXPERT.fullmatch(module):
        single[match[1], PARTS[match[3]], int(match[2])] = (a, b * scale_of(module, len(a), config))
    elif match := STACKED.fullmatch(module):
        single |= stacked(match[1], PARTS[match[2]], a, b * scale_of(module, a.shape[1], config), experts)
    elif match := FUSED.fullmatch(module):
        parameter = "gate_up_proj" if match[2] else "down_proj"
        rank = len(a) // experts
        scale = scale_of(f"{match[1]}.mlp.experts.{parameter}", rank, config)
        single |= unfused(match[1], parameter, a, b * scale, experts, config)
    else:
        rest[module] = (a, b * scale_of(module, len(a), config))


def scale_of(module: str, rank: int, config: Any) -> float:
    """alpha / r, or alpha / sqrt(r); a pattern for the module counts before lora_alpha."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((own for pattern, own in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), None)
    return float(alpha or config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def stacked(layer: str, part: str, a_Eri: torch.Tensor, b_Eor: torch.Tensor, experts: int) -> Experts:
    """A factor with one entry serves every expert."""
    a_Eri, b_Eor = (one.expand(experts, -1, -1) for one in (a_Eri, b_Eor))
    return {(layer, part, expert): (a_Eri[expert], b_Eor[expert]) for expert in range(experts)}


def unfused(layer: str, parameter: str, a: torch.Tensor, b: torch.Tensor, experts: int, config: Any) -> Experts:
    """gate_up_proj's halves are gate and up. PEFT 0.18: ΔW = (B·A)ᵀ, A (E·r, out), B (in, r·E)."""
    a_Eri = a.unflatten(0, (experts, -1))
    grouped = config.get("lora_B_layout") == "grouped_by_expert"
    b_Eor = b.unflatten(1, (experts, -1)).movedim(1, 0) if grouped else b.unflatten(1, (-1, experts)).movedim(2, 0)
    if str(config.get("peft_version", "")).startswith(OLD):
        a_Eri, b_Eor = b_Eor.transpose(1, 2), a_Eri.transpose(1, 2)
    if parameter == "down_proj":
        return stacked(layer, "down", a_Eri, b_Eor, experts)
    gate_b, up_b = b_Eor.chunk(2, dim=1)
    return stacked(layer, "gate", a_Eri, gate_b, experts) | stacked(layer, "up", a_Eri, up_b, experts)
