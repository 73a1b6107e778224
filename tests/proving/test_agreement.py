"""The judgement on real models: transformers in bfloat16 plays the server, as it should be and with one thing wrong in
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import FAMILIES, adapter_folder, write_checkpoint

from kt_launch.proving.agreement import FACTOR, SHARES, SMALLEST, Agreement, Reference, compare, exceeded
from kt_launch.proving.float32_run import Run
from kt_launch.proving.logprobs import LENGTHS, TOP, Answer

RNG = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(0, 512, (length,), generator=RNG).tolist() for length in LENGTHS]
NONE = np.zeros((0, 0), np.float32)
Weights = dict[str, Any]


def reference_of(
    checkpoint: Path, folder: Path, adapter: Path | None = None, ignore: tuple[str, ...] = ()
) -> Reference:
    """What the process writes down, computed here."""
    request = {
        "model": str(checkpoint),
        "quantized": None,
        "resident": 0,
        "options": {"ignore": ignore},
        "prompts": PROMPTS,
    }
    Run(request).write_side(folder / "reference.npz", adapter)
    with np.load(folder / "reference.npz", allow_pickle=False) as found:
        return Reference(found["ids_NM"], found["logprobs_NM"], found["rounded_N"], str(found["how"]))


def served_by(model: Any) -> Answer:
    """What a server of this model answers."""
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS])
    logprobs_NK, ids_NK = torch.log_softmax(logits.float(), dim=-1).topk(TOP, dim=-1)
    return Answer(ids_NK.numpy().astype(np.int32), logprobs_NK.numpy(), np.zeros(len(logits), np.float32), NONE)


def in_bfloat16(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small matrices are not worth two, whose waiting spins."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return reference_of(checkpoint, checkpoint.parent)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Any:
    return in_bfloat16(checkpoint)


def test_the_right_model_in_bfloat16_holds(server: Any, reference: Reference) -> None:
    found = compare(served_by(server), reference)
    print(found)
    assert found.holds
    assert found.positions == sum(LENGTHS)
    assert all(0.5 * exceeded(reference.rounded_N, 0.5) < error for error in found.errors.values())


def swap(weights: Weights, one: str, other: str) -> None:
    kept = weights[one].clone()
    weights[one].copy_(weights[other])
    weights[other].copy_(kept)


def swap_attention(weights: Weights) -> None:
    swap(weights, "model.layers.1.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight")


def swap_two_heads(weights: Weights) -> None:
    matrix = weights["model.layers.1.self_attn.o_proj.weight"]
    matrix.copy_(torch.cat([matrix[:, 32:64], matrix[:, :32], matrix[:, 64:]], dim=1))


def swap_norms(weights: Weights) -> None:
    swap(weights, "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight")


def draw_the_head(weights: Weights) -> None:
    weights["lm_head.weight"].normal_(0, 0.08, generator=torch.Generator().manual_seed(0))


def draw_a_router(weights: Weights) -> None:
    weights["model.layers.2.mlp.gate.weight"].normal_(0, 0.3, generator=torch.Generator().manual_seed(0))


def swap_two_experts(weights: Weights) -> None:
    down = weights["model.layers.2.mlp.experts.down_proj"]
    down.copy_(down[[1, 0, *range(2, len(down))]])


def slow_the_rotation(weights: Weights) -> None:
    for name in weights:
        if name.endswith("rotary_emb.inv_freq"):
            weights[name].mul_(0.99)


def served_with(fault: Callable[[Weights], None], model: Any) -> Answer:
    """What it answers with something wrong in it, which is mended afterwards."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        fault(weights)
        try:
            return served_by(model)
        finally:
            for name, weight in kept.items():
                weights[name].copy_(weight)


FAULTS = (slow_the_rotation, swap_attention, swap_two_heads, swap_norms, draw_the_head, draw_a_router, swap_two_experts)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_model_does_not(server: Any, reference: Reference, fault: Callable[[Weights], None]) -> None:
    found = compare(served_with(fault, server), reference)
    print(found)
    assert not found.holds
    assert abs(found.worst.found - found.worst.expected) > 0.1


ADAPTED = ("qwen3_moe", "deepseek_v2")


@pytest.mark.parametrize("family", ADAPTED)
def test_an_adapter_holds_as_it_is_and_not_with_another_scale(family: str, tmp_path: Path) -> None:
    """By PEFT and by the definition, which agree."""
    from peft import PeftModel

    checkpoint, adapter = write_checkpoint(family, tmp_path / "model"), adapter_folder(family, "experts_r4")
    by_peft = reference_of(checkpoint, tmp_path, adapter)
    assert by_peft.how.startswith("PEFT ")
    model = PeftModel.from_pretrained(in_bfloat16(checkpoint), adapter).eval()
    assert compare(served_by(model), by_peft).holds
    assert not compare(served_by(in_bfloat16(checkpoint)), by_peft).holds
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.8)
    assert not compare(served_by(model), by_peft).holds
    defined = reference_of(checkpoint, tmp_path, adapter, ignore=("router",))
    assert np.abs(defined.logprobs_NM[:, :TOP] - by_peft.logprobs_NM[:, :TOP]).max() < 1e-4


def numbers(rounded_N: Any, off_N: Any, lowest: float = -9.0) -> Agreement:
    """Of a server that is off by so much at each position."""
    count = len(rounded_N)
    ids, logprobs = np.tile(np.arange(TOP, dtype=np.int32), (count, 1)), np.full((count, TOP), -3.0, np.float32)
    answer = Answer(ids, logprobs + np.array(off_N, np.float32)[:, None], np.zeros(count, np.float32), NONE)
    known = np.append(ids, np.full((count, 1), 400, np.int32), axis=1)
    listed = np.append(logprobs, np.full((count, 1), lowest, np.float32), axis=1)
    return compare(answer, Reference(known, listed, np.array(rounded_N, np.float32), ""))


def test_the_bound_is_three_times_what_half_as_many_positions_exceed() -> None:
    rounded = np.full(100, 0.01)
    rounded[:8] = 0.5  # where an expert is chosen by a rounding
    assert numbers(rounded, np.full(100, FACTOR * 0.0099)).holds
    assert not numbers(rounded, np.full(100, FACTOR * 0.0101)).holds
    often = np.full(100, 0.01)
    often[:9] = 5.0
    assert numbers(rounded, often).holds, "jumps may be somewhat more frequent"
    often[:26] = 5.0
    assert not numbers(rounded, often).holds


def test_what_is_no_number_or_an_unlisted_token_never_holds() -> None:
    assert not numbers(np.full(10, 0.01), np.full(10, np.nan)).holds
    assert numbers(np.zeros(10), np.full(10, SMALLEST / 2)).holds
    answer = Answer(
        np.full((10, TOP), 300, np.int32), np.full((10, TOP), -1.0, np.float32), np.zeros(10, np.float32), NONE
    )
    listed = Reference(
        np.zeros((10, 3), np.int32), np.full((10, 3), -9.0, np.float32), np.full(10, 0.01, np.float32), ""
    )
    found = compare(answer, listed)
    assert not found.holds and found.worst.expected == -9.0
    assert set(found.as_dict()["error"]) == {f"{share:.0%}" for share in SHARES}
