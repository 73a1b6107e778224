"""Writes fixtures/: small real adapters by several PEFT versions, each with the ΔW that PEFT itself merges.

    python make_fixtures.py --transformers-5 PYTHON --transformers-4 PYTHON

Each PYTHON has torch, accelerate, safetensors and that transformers; PEFT's versions are installed into a throw-away
folder beside it. The same file run with --one writes one case inside such an environment. What KT's training writes
(kt_training) no package on PyPI writes, so its layout is written by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "fixtures"
PEFT_VERSIONS = ("0.18.1", "0.19.1", "0.21.2")
SAMPLE = 64
"""Entries of each ΔW that expected.safetensors keeps, beside its norm."""

HIDDEN, INNER, EXPERTS = 64, 40, 4
EXPERT_PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **COMMON,
        **MLA,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **COMMON,
        **MLA,
        "q_lora_rank": 24,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "glm4_moe": {
        **COMMON,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "mixtral": {
        **COMMON,
        "head_dim": 16,
        "intermediate_size": INNER,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        **COMMON,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": 48,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **COMMON,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
}

KT_CASES = {"kt_training": "deepseek_v2"} | {f"d_{family}": family for family in BASES if family != "deepseek_v2"}
"""What KT's training writes: name -> family."""

# One case: name -> (transformers major, PEFT version, family, LoraConfig arguments, dtype of the file).
Case = tuple[int, str, str, dict[str, Any], str]


def _projections(family: str) -> list[str]:
    return ["w1", "w3", "w2"] if family == "mixtral" else EXPERT_PROJECTIONS


def _experts_only(family: str) -> str:
    """A regex, because the plain names reach shared experts and dense layers too."""
    return rf".*\.experts\.\d+\.({'|'.join(_projections(family))})"


def converted_families(version: str) -> list[str]:
    """Where PEFT converts gate, up and down: not before 0.19, and of Qwen2-MoE only the shared expert is found."""
    return [family for family in BASES if family != "qwen2_moe"] if version != "0.18.1" else []


def cases() -> dict[str, Case]:
    """Every fixture that PEFT writes."""
    table: dict[str, Case] = {}
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    for version in PEFT_VERSIONS:
        short = version.replace(".", "")
        for family in BASES:
            table[f"a_{family}_{short}"] = (4, version, family, {"target_modules": _experts_only(family)}, "float32")
            options = {"target_modules": [], "target_parameters": fused}
            table[f"b_{family}_{short}"] = (5, version, family, options, "float32")
        for family in converted_families(version):
            options = {"target_modules": [*_projections(family)]}
            table[f"c_{family}_{short}"] = (5, version, family, options, "float32")
    newest = PEFT_VERSIONS[-1]
    everything = [*EXPERT_PROJECTIONS, "q_proj", "o_proj", "kv_a_proj_with_mqa"]
    extra: dict[str, Case] = {
        "a_rslora": (4, newest, "deepseek_v2", {"target_modules": EXPERT_PROJECTIONS, "use_rslora": True}, "float32"),
        "a_patterns": (
            4,
            newest,
            "qwen3_moe",
            {
                "target_modules": EXPERT_PROJECTIONS,
                "rank_pattern": {"down_proj": 3, r"layers\.1\.mlp\.experts\.2\.gate_proj": 5},
                "alpha_pattern": {"up_proj": 1, r"layers\.0\.mlp\.experts\.\d+\.down_proj": 9},
            },
            "float32",
        ),
        "a_rslora_patterns": (
            4,
            newest,
            "glm4_moe",
            {
                "target_modules": EXPERT_PROJECTIONS,
                "use_rslora": True,
                "rank_pattern": {"down_proj": 4},
                "alpha_pattern": {"gate_proj": 3},
            },
            "float32",
        ),
        "a_down_only": (4, newest, "mixtral", {"target_modules": ["w2"]}, "float32"),
        "a_one_layer": (
            4,
            newest,
            "qwen2_moe",
            {"target_modules": EXPERT_PROJECTIONS, "layers_to_transform": [1]},
            "float32",
        ),
        "a_everything": (4, newest, "deepseek_v2", {"target_modules": everything}, "float32"),
        "a_all_linear": (4, newest, "qwen2_moe", {"target_modules": "all-linear"}, "float32"),
        "a_bfloat16": (4, newest, "deepseek_v3", {"target_modules": EXPERT_PROJECTIONS}, "bfloat16"),
        "b_float16": (
            5,
            newest,
            "qwen3_moe",
            {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": fused},
            "float16",
        ),
        "b_down_only": (5, newest, "qwen3_moe", {"target_modules": [], "target_parameters": fused[1:]}, "float32"),
        "b_gate_up_only": (5, newest, "mixtral", {"target_modules": [], "target_parameters": fused[:1]}, "float32"),
        "b_gate_up_only_0181": (
            5,
            "0.18.1",
            "deepseek_v2",
            {"target_modules": [], "target_parameters": fused[:1]},
            "float32",
        ),
        "b_rslora_patterns": (
            5,
            newest,
            "deepseek_v2",
            {
                "target_modules": [],
                "target_parameters": fused,
                "use_rslora": True,
                "rank_pattern": {"experts.down_proj": 3},
                "alpha_pattern": {"experts.gate_up_proj": 5},
            },
            "float32",
        ),
        "b_one_layer": (
            5,
            newest,
            "qwen3_moe",
            {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
            "float32",
        ),
        "c_rslora": (
            5,
            newest,
            "qwen3_moe",
            {"target_modules": EXPERT_PROJECTIONS, "use_rslora": True},
            "float32",
        ),
    }
    return {**table, **extra}


def main() -> None:
    """Everything, or with --one a single case in this very environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-4")
    parser.add_argument("--transformers-5")
    parser.add_argument("--only", default="", help="write cases whose name starts so")
    parser.add_argument("--one", nargs="*")
    options = parser.parse_args()
    if options.one is not None:
        for name in options.one:
            _write_case(name, FOLDER / name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        pythons = {4: options.transformers_4, 5: options.transformers_5}
        for version in PEFT_VERSIONS:
            for major, python in pythons.items():
                names = [n for n, c in cases().items() if c[:2] == (major, version) and n.startswith(options.only)]
                if python and names:
                    _run(python, version, Path(scratch), names)
    for name, family in KT_CASES.items():
        if name.startswith(options.only):
            _write_kt_training(FOLDER / name, family)


def _run(python: str, version: str, scratch: Path, names: list[str]) -> None:
    peft = scratch / f"peft-{version}"
    if not peft.exists():
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(peft), f"peft=={version}"]
        subprocess.run(install, check=True)
    path = f"{peft}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run([python, str(Path(__file__)), "--one", *names], check=True, env={**os.environ, "PYTHONPATH": path})


def _write_case(name: str, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    _, _, family, options, dtype = cases()[name]
    torch.manual_seed(zlib.crc32(name.encode()))
    shutil.rmtree(folder, ignore_errors=True)
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    model = get_peft_model(_zero_model(family), config)
    found = False
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter) * 0.1
            found = True
    if not found:
        raise SystemExit(f"{name}: nothing was targeted")
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "base.json").write_text(json.dumps({"model_type": family, **BASES[family]}, indent=1) + "\n")
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()), indent=1) + "\n")
    _write_expected(folder, _deltas(model.float().merge_and_unload()))


def _zero_model(family: str) -> Any:
    """A float32 base of zeros: what is merged into it is ΔW itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.float()


def _deltas(model: Any) -> dict[str, Any]:
    """ΔW by layer.expert.projection of routed experts, and by module name of everything else."""
    deltas: dict[str, Any] = {}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        if not tensor.abs().max() > 0:
            continue
        if "experts" not in parts or ("weight" in parts[-1:] and not parts[parts.index("experts") + 1].isdigit()):
            deltas[key.removesuffix(".weight")] = tensor
            continue
        layer, rest = parts[parts.index("layers") + 1], parts[parts.index("experts") + 1 :]
        names = {"w1": "gate", "w3": "up", "w2": "down"}
        if rest[0].isdigit():
            deltas[f"{layer}.{rest[0]}.{names.get(rest[1], rest[1].removesuffix('_proj'))}"] = tensor
        elif rest[0] == "gate_up_proj":
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2, dim=0)
                deltas[f"{layer}.{expert}.gate"], deltas[f"{layer}.{expert}.up"] = gate, up
        else:
            deltas.update({f"{layer}.{expert}.{rest[0][:-5]}": each for expert, each in enumerate(tensor)})
    return deltas


def sample_places(name: str, size: int) -> Any:
    """Where one ΔW is sampled: the same places for everybody who knows its name and size."""
    import numpy as np

    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, size, SAMPLE)


def _write_expected(folder: Path, deltas: dict[str, Any]) -> None:
    """All samples in one float32 tensor; names, shapes and norms beside them."""
    import numpy as np
    from safetensors.numpy import save_file

    names = sorted(deltas)
    arrays = {name: np.ascontiguousarray(deltas[name].float().numpy()) for name in names}
    samples = np.stack([arrays[name].ravel()[sample_places(name, arrays[name].size)] for name in names])
    facts = {n: [*arrays[n].shape, float(np.linalg.norm(arrays[n].astype(np.float64)))] for n in names}
    save_file({"samples": samples}, str(folder / "expected.safetensors"), metadata={"facts": json.dumps(facts)})


def _write_kt_training(folder: Path, family: str) -> None:
    """fused_expert_lora.safetensors for layer 1, beside an adapter_model.safetensors for the attention."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(list(KT_CASES.values()).index(family) + 4)
    rank, alpha = 8, 16

    def factor(*shape: int) -> Any:
        return (torch.randn(*shape, generator=generator) * 0.1).to(torch.bfloat16)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fused, deltas = {}, {}
    for projection, (out_size, in_size) in {
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "down": (HIDDEN, INNER),
    }.items():
        a, b = factor(EXPERTS, rank, in_size), factor(EXPERTS, out_size, rank)
        fused[f"layers.1.experts.{projection}_lora_a"] = a
        fused[f"layers.1.experts.{projection}_lora_b"] = b
        for expert in range(EXPERTS):
            deltas[f"1.{expert}.{projection}"] = b[expert].double() @ a[expert].double() * (alpha / rank)
    rest = {}
    for layer in range(2):
        a, b = factor(rank, 64), factor(HIDDEN, rank)
        module = f"model.layers.{layer}.self_attn.o_proj"
        rest[f"base_model.model.{module}.lora_A.weight"], rest[f"base_model.model.{module}.lora_B.weight"] = a, b
        deltas[module] = b.double() @ a.double() * (alpha / rank)
    save_file(fused, str(folder / "fused_expert_lora.safetensors"))
    save_file(rest, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    config |= {"bias": "none", "target_modules": ["o_proj"], "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    base = {"model_type": family, **BASES[family]}
    (folder / "base.json").write_text(json.dumps(base, indent=1) + "\n")
    _write_expected(folder, deltas)


if __name__ == "__main__":
    sys.exit(main())
