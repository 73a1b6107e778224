"""What fit.py says of models whose sizes are public, against sums done by hand from their config.json: DeepSeek-V2-Lite
and Qwen3-30B-A3B on a GPU, routed experts on the host. Their checkpoints are real headers over files full of holes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from machines import GIB, Machine

from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import Gpu, read_host
from kt_launch.machine.ports import Port
from kt_launch.planning.memory_fit import (
    CUDA_CONTEXT,
    Demand,
    default_fraction,
    estimate,
    kv_bytes,
    rest_bytes,
    shard_bytes,
)
from kt_launch.planning.resolve import resolve
from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.errors import Problems
from kt_model.plan import HOST_MEMORY

Shapes = dict[str, tuple[int, ...]]
V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400, "hidden_size": 2048,
    "num_hidden_layers": 27, "first_k_dense_replace": 1, "moe_layer_freq": 1, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip


def mlp(name: str, inner: int, hidden: int = 2048) -> Shapes:
    return {f"{name}.gate_proj.weight": (inner, hidden), f"{name}.up_proj.weight": (inner, hidden),
            f"{name}.down_proj.weight": (hidden, inner)}  # fmt: skip


def ends(vocab: int) -> Shapes:
    return {"model.embed_tokens.weight": (vocab, 2048), "lm_head.weight": (vocab, 2048), "model.norm.weight": (2048,)}


def v2_lite() -> Shapes:
    shapes = ends(102400)
    for layer in range(27):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (3072, 2048), f"{at}.self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
            f"{at}.self_attn.kv_a_layernorm.weight": (512,), f"{at}.self_attn.kv_b_proj.weight": (4096, 512),
            f"{at}.self_attn.o_proj.weight": (2048, 2048),
        }  # fmt: skip
        if layer == 0:
            shapes |= mlp(f"{at}.mlp", 10944)
            continue
        shapes |= {f"{at}.mlp.gate.weight": (64, 2048)} | mlp(f"{at}.mlp.shared_experts", 2816)
        for expert in range(64):
            shapes |= mlp(f"{at}.mlp.experts.{expert}", 1408)
    return shapes


def qwen3_30b() -> Shapes:
    shapes = ends(151936)
    for layer in range(48):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (128,) for name in "qk"}
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (4096, 2048), f"{at}.self_attn.k_proj.weight": (512, 2048),
            f"{at}.self_attn.v_proj.weight": (512, 2048), f"{at}.self_attn.o_proj.weight": (2048, 4096),
            f"{at}.mlp.gate.weight": (128, 2048),
        }  # fmt: skip
        for expert in range(128):
            shapes |= mlp(f"{at}.mlp.experts.{expert}", 768)
    return shapes


def write_holes(folder: Path, config: dict[str, Any], shapes: Shapes) -> Path:
    """A checkpoint whose header is real and whose weights take no disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


KNOWN = {"V2-Lite": (V2_LITE, v2_lite), "Qwen3-30B": (QWEN3_30B, qwen3_30b)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("known")
    return {name: write_holes(root / name, config, shapes()) for name, (config, shapes) in KNOWN.items()}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: read_checkpoint(folder) for name, folder in folders.items()}


PUBLIC = {"V2-Lite": 15_706_484_224, "Qwen3-30B": 30_532_122_624}
"""Parameters, as the models' publishers count them."""
ROUTED = {"V2-Lite": 26 * 64 * 3 * 2048 * 1408, "Qwen3-30B": 48 * 128 * 3 * 2048 * 768}


@pytest.mark.parametrize("name", KNOWN)
def test_the_headers_are_those_of_the_published_model(name: str, bases: dict[str, Checkpoint]) -> None:
    assert sum(prod(tensor.shape) for tensor in bases[name].tensors.values()) == PUBLIC[name]
    assert bases[name].expert_bytes == 2 * ROUTED[name]


@pytest.mark.parametrize("name", KNOWN)
def test_what_lies_on_the_device_is_all_but_the_routed_experts(name: str, bases: dict[str, Checkpoint]) -> None:
    # MLA's kv_b_proj, 16 heads of 128 + 128 from a latent vector of 512, is kept a second time, transposed.
    again = {"V2-Lite": 27 * 16 * (128 + 128) * 512, "Qwen3-30B": 0}[name]
    assert rest_bytes(bases[name]) == 2 * (PUBLIC[name] - ROUTED[name] + again)
    assert rest_bytes(bases[name]) / 1e9 == pytest.approx({"V2-Lite": 2.736, "Qwen3-30B": 3.082}[name], abs=0.001)


@pytest.mark.parametrize("name", KNOWN)
def test_bytes_of_one_token_in_the_cache(name: str, bases: dict[str, Checkpoint]) -> None:
    """MLA keeps 512 + 64 values a layer for all heads, GQA a key and a value of 128 for each of 4 heads."""
    one = {"V2-Lite": 27 * (512 + 64) * 2, "Qwen3-30B": 48 * 2 * 4 * 128 * 2}[name]
    assert one == {"V2-Lite": 31_104, "Qwen3-30B": 98_304}[name]
    few, many = (
        Demand("bf16", 1, "cuda", 4096, 8, tokens, None, max_rank=0, max_per_batch=0) for tokens in (1000, 11_000)
    )
    assert kv_bytes(many, bases[name]) - kv_bytes(few, bases[name]) == 10_000 * one


@pytest.mark.parametrize("name", KNOWN)
def test_the_host_holds_the_routed_experts(name: str, bases: dict[str, Checkpoint]) -> None:
    bf16, int8, int4 = (sum(shard_bytes(f"AMX{form}_SFT", bases[name], 1)) for form in ("BF16", "INT8", "INT4"))
    assert bf16 == 2 * ROUTED[name]  # all widths are multiples of 64, so nothing is padded
    wide, inner = 2048, {"V2-Lite": 1408, "Qwen3-30B": 768}[name]
    experts = ROUTED[name] // (3 * wide * inner)
    assert int8 == ROUTED[name] + experts * 4 * (2 * inner + wide)
    assert int4 == ROUTED[name] // 2 + 2 * ROUTED[name] // 32


@pytest.mark.parametrize("name", KNOWN)
def test_a_plan_for_a_gpu_says_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    machine = read_host(Machine(cores=16, memory_bytes=256 * GIB).write(tmp_path))
    host = replace(machine, gpus=(Gpu(0, "NVIDIA Test", 24 * GIB, 23 * GIB),), cuda_torch=True)
    typed = {"model": {"path": str(folders[name])}, "server": {"max_total_tokens": 65536, "context_length": 8192}}
    config, mistakes = validate(typed | {"kt": {"packed_cache": "off", "num_gpu_experts": 0}})
    problems = Problems()
    facts = replace(read_facts(config, Sources(), problems, host), port=Port(30000, True))
    assert mistakes == []
    fit = resolve(config, facts, Sources(), problems).value("fit")
    gpu, one = fit["GPU 0"], {"V2-Lite": 31_104, "Qwen3-30B": 98_304}[name]
    assert gpu["SGLang itself"] == CUDA_CONTEXT
    assert gpu["rest of the model"] / GIB == pytest.approx({"V2-Lite": 2.55, "Qwen3-30B": 2.87}[name], abs=0.01)
    assert gpu["KV cache"] / GIB == pytest.approx(65536 * one / GIB, abs=0.01)
    assert fit[HOST_MEMORY]["routed experts"] == 2 * ROUTED[name]
    assert fit[HOST_MEMORY]["rest of the model"] == 0


H200 = Gpu(0, "NVIDIA H200", 143771 << 20, 143156 << 20)


@pytest.mark.parametrize(
    ("method", "resident", "measured_bytes"),
    [("int8", 0, 141_214_875_648), ("int4", 0, 141_244_235_776), ("int8", 16, 140_243_894_272)],
)
def test_a_gpus_estimate_is_what_was_measured_there(
    method: str, resident: int, measured_bytes: int, bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """DeepSeek-V2-Lite's shape on an H200, Triton attention, four adapters of rank 8 on all experts, long prompts
    on the card, SGLang's own share: the peaks of three runs."""
    machine = read_host(Machine(cores=16, memory_bytes=256 * GIB).write(tmp_path))
    wanted = Demand(
        method=method, pools=1, device="cuda", context_length=40960, max_running_requests=None, max_total_tokens=None,
        mem_fraction=None, max_rank=8, max_per_batch=5, threads=16, expert_ranks=(8,) * 4, resident=resident,
        streamed=True, prefill_tokens=8192, captured=256, triton_attention=True,
    )  # fmt: skip
    fit = estimate(wanted, bases["V2-Lite"], replace(machine, gpus=(H200,)))
    assert fit.short == ()
    assert sum(fit.needs["GPU 0"].values()) == pytest.approx(measured_bytes, rel=0.03)


@pytest.mark.parametrize(
    ("gib", "tokens", "captured", "tensor", "fraction"),
    [
        (140.4, 8192, 256, 1, 0.907),  # an H200, as SGLang's log said
        (140.4, None, 256, 2, 0.906),
        (79.6, 2048, 0, 1, 0.874),
        (23.9, None, 256, 1, 0.702),
        (15.9, None, 8, 1, 0.771),
    ],
)
def test_the_share_that_sglang_takes_by_itself(
    gib: float, tokens: int | None, captured: int, tensor: int, fraction: float
) -> None:
    """By handle_gpu_memory_settings of SGLang 0.5.23."""
    wanted = Demand(
        method="bf16", pools=1, device="cuda", context_length=None, max_running_requests=None, max_total_tokens=None,
        mem_fraction=None, max_rank=0, max_per_batch=0, tensor=tensor, prefill_tokens=tokens, captured=captured,
    )  # fmt: skip
    size = int(gib * GIB)
    assert default_fraction(wanted, Gpu(0, "x", size, size)) == pytest.approx(fraction, abs=0.0011)


def test_layers_that_only_speculation_uses_take_nothing(tmp_path: Path, bases: dict[str, Checkpoint]) -> None:
    """DeepSeek-V3 and GLM-4 ship one layer more than they are said to have, experts included."""

    def past_the_last(names: Iterable[str]) -> Shapes:
        return {name.replace("layers.26.", "layers.27."): (64, 2048) for name in names if "layers.26." in name}

    more = v2_lite() | past_the_last(v2_lite()) | {"model.layers.27.eh_proj.weight": (2048, 4096)}
    base = read_checkpoint(write_holes(tmp_path / "more", V2_LITE, more))
    assert rest_bytes(base) == rest_bytes(bases["V2-Lite"])
