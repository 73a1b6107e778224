"""Writes a checkpoint of DeepSeek-V2-Lite's shape with random weights, and four rank-8 adapters on its routed experts.

Needs a GPU for the random numbers; 27 layers take 31 GB and under a minute: model.py FOLDER LAYERS
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

H, I, E, RANK, VOCABULARY, HEADS = 2048, 1408, 64, 8, 102400, 16  # noqa: E741
ADAPTERS = ("a1", "a2", "a3", "a4")
WRITERS = 6
CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 10944,
    "moe_intermediate_size": I,
    "n_routed_experts": E,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "use_cache": True,
}
PROJECTIONS = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
Tensors = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()


def attention(prefix: str) -> Tensors:
    ones = torch.ones(H, dtype=torch.bfloat16)
    return {
        f"{prefix}.input_layernorm.weight": ones,
        f"{prefix}.post_attention_layernorm.weight": ones.clone(),
        f"{prefix}.self_attn.q_proj.weight": random(HEADS * 192, H),
        f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": random(576, H),
        f"{prefix}.self_attn.kv_a_layernorm.weight": torch.ones(512, dtype=torch.bfloat16),
        f"{prefix}.self_attn.kv_b_proj.weight": random(HEADS * 256, 512),
        f"{prefix}.self_attn.o_proj.weight": random(H, HEADS * 128),
    }


def mlp(prefix: str, inner: int) -> Tensors:
    shapes = {"gate_proj": (inner, H), "up_proj": (inner, H), "down_proj": (H, inner)}
    return {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}


def experts(prefix: str) -> Tensors:
    found: Tensors = {}
    for name, shape in PROJECTIONS.items():
        stacked = random(E, *shape)
        found |= {f"{prefix}.mlp.experts.{e}.{name}.weight": stacked[e].clone() for e in range(E)}
    return found


def factors(prefix: str) -> Tensors:
    found: Tensors = {}
    for name, (outputs, inputs) in PROJECTIONS.items():
        a, b = random(E, RANK, inputs), random(E, outputs, RANK)
        for e in range(E):
            place = f"base_model.model.{prefix}.mlp.experts.{e}.{name}"
            found |= {f"{place}.lora_A.weight": a[e].clone(), f"{place}.lora_B.weight": b[e].clone()}
    return found


def layer(number: int) -> Tensors:
    prefix = f"model.layers.{number}"
    if number == 0:
        return attention(prefix) | mlp(f"{prefix}.mlp", 10944)
    gate = {f"{prefix}.mlp.gate.weight": random(E, H)}
    return attention(prefix) | gate | mlp(f"{prefix}.mlp.shared_experts", 2 * I) | experts(prefix)


def head() -> Tensors:
    return {
        "model.embed_tokens.weight": random(VOCABULARY, H),
        "model.norm.weight": torch.ones(H, dtype=torch.bfloat16),
        "lm_head.weight": random(VOCABULARY, H),
    }


def write_base(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(str(files("kt_launch") / "demo" / "model" / name), folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    index: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as pool:
        written: list[Future[None]] = []
        for number in range(-1, layers):
            tensors, name = head() if number < 0 else layer(number), f"part-{number + 1:02d}.safetensors"
            index |= dict.fromkeys(tensors, name)
            written.append(pool.submit(save_file, tensors, folder / name, {"format": "pt"}))
            if number >= WRITERS:
                written[number - WRITERS].result()  # what waits to be written lies in memory
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_adapter(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    for number in range(1, layers):
        tensors |= factors(f"model.layers.{number}")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(PROJECTIONS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(1)
    write_base(folder / "base", layers)
    for name in ADAPTERS:
        write_adapter(folder / name, layers)


if __name__ == "__main__":
    main()
