"""Every family on a running server, with an adapter on all that is served of it and with experts in every format,
against transformers in float32 on the checkpoint that action=merge makes of them; each family's checkpoint lies on the
disk in another of the ways that there are. test_served.py has DeepSeek-V2.

Bound, unit, and which prompts are compared: tests/support/float32_model.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from float8_checkpoints import write_float8
from float32_model import FAR_OFF, Float32Model, errors_in_sigmas, long_errors
from fused_checkpoints import fuse, save_fused
from launching import Running, launched
from odd_checkpoints import consolidated, split
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from written import (
    write_converted,
    write_fused,
    write_grouped,
    write_kt_training,
    write_per_expert,
    write_stacked,
    write_wrapped,
)

from kt_launch.checkpoint import read_checkpoint
from kt_launch.families import FAMILIES
from kt_launch.importer import import_adapter
from kt_launch.importer.serving import unserved_parts
from kt_launch.weights.experts import ExpertSource
from kt_launch.weights.merging import merge

pytestmark = pytest.mark.server
COMPARED = 3
SIZE = 0.12
"""Of B: deltas of about the base's own size. With larger ones transformers in bfloat16 is 15 deviations off as well."""
WORDS = """we one two day sun moon red blue sea no yes cat old new go stop man tree bird fish rain wind snow fire stone
bread milk salt tea wine king queen ship road house door wall roof hand foot eye ear nose mouth hair skin up down left
right near far high low big small long short hot cold wet dry hard soft"""
PROMPTS = (
    "hello world", "how are you", "the dog", "the quick brown fox", "fine", "what is", "good morning", "over there",
    "you and the fox", "a lazy dog", "jumps", "today", "is it fine", "thank you", "where is the dog", *WORDS.split(),
)  # fmt: skip
ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".q_a_proj", ".q_b_proj", ".kv_a_proj_with_mqa", ".kv_b_proj")
LOADED = ("fused", "fused_old", "converted", "kt")
OTHER_TOOLS = ("grouped", "stacked", "wrapped")
"""Read alike in every family, so that one of them is enough."""


def write_adapters(folder: Path, family: str, checkpoint: Path) -> dict[str, Path]:
    """By name; `everything` reaches each matrix that SGLang has LoRA on in this family."""
    parts = FAMILIES[family].projections
    experts = [f".experts.{expert}.{part}" for expert in range(8) for part in parts]
    dense = [f".{place}.{part}" for place in ("mlp", "shared_experts", "shared_expert") for part in parts]
    ends = [*experts, *dense, *ATTENTION, "embed_tokens", "lm_head"]
    return {
        "everything": write_per_expert(folder / "everything", checkpoint, ends, seed=1, size=SIZE),
        "fused": write_fused(folder / "fused", checkpoint, seed=2, size=SIZE),
        "fused_old": write_fused(folder / "fused_old", checkpoint, seed=3, size=SIZE, old=True),
        "converted": write_converted(folder / "converted", checkpoint, seed=4, rank=2, size=SIZE),
        "kt": write_kt_training(folder / "kt", checkpoint, seed=5, size=SIZE),
        "grouped": write_grouped(folder / "grouped", checkpoint, seed=6, size=SIZE),
        "stacked": write_stacked(folder / "stacked", checkpoint, seed=7, size=SIZE),
        "wrapped": write_wrapped(folder / "wrapped", checkpoint, experts, seed=8, size=SIZE),
    }


@dataclass
class Served:
    """A running server, its checkpoint in float32, and the adapters."""

    running: Running
    exact: Path
    adapters: dict[str, Path]

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        """Without an adapter, as `decided` gives it."""
        return HuggingFace(self.exact).decided()


CHANGES: dict[str, dict[str, Any]] = {
    # as Moonlight: no scaling of positions
    "deepseek_v3": {"rope_scaling": None, "rope_theta": 50000.0, "moe_intermediate_size": 40, "intermediate_size": 90},
    "glm4_moe": {"moe_intermediate_size": 8},
    "mixtral": {"intermediate_size": 100},
    "qwen2_moe": {
        "moe_intermediate_size": 176,
        "shared_expert_intermediate_size": 184,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"tie_word_embeddings": True},
}
"""Of config.json: expert widths that are no multiple of 32, heads that are the embedding."""
OnDisk = Callable[[Path, Path], tuple[Path, dict[str, torch.Tensor]]]


def saved_fused(hub: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """As transformers 5 saves it in its own format, in its own words."""
    family = json.loads((hub / "config.json").read_text())["model_type"]
    return save_fused(family, folder, **CHANGES[family]), load_file(hub / "model.safetensors")


def transposed_in_shards(hub: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Experts fused as (in, out), gate_up_proj and down_proj in different files."""
    shutil.copytree(hub, folder)
    fuse(folder, transposed=True)
    split(folder)
    return folder, load_file(hub / "model.safetensors")


def with_left_overs(hub: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Beside a file with all weights once more, and wrong ones, which the index does not name; the folder's name is one
    that patterns are made of."""
    folder = shutil.copytree(hub, folder.with_name("model [1]*"))
    consolidated(folder)
    return folder, load_file(hub / "model.safetensors")


def merged_from_float8(hub: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """What action=merge makes of a float8 checkpoint with a scale a tensor."""
    float8 = folder.with_name("float8")
    exact = write_float8("autofp8", hub, float8)
    assert merge(ExpertSource(read_checkpoint(float8, float8=True)), None, folder)
    return folder, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}


ON_DISK: dict[str, OnDisk] = {
    "deepseek_v3": saved_fused,
    "mixtral": saved_fused,
    "qwen3_moe": transposed_in_shards,
    "glm4_moe": with_left_overs,
    "qwen2_moe": merged_from_float8,
}
"""How the checkpoint that is served lies on the disk, with its weights under the names of hubs."""
UNREADABLE = {"qwen3_moe": ("proof.text=warn",)}
"""transformers cannot read it as it lies there, so nobody vouches for random weights that predict no text."""


@pytest.fixture(scope="module", params=sorted(FAMILIES.keys() - {"deepseek_v2"}))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    exact = write_checkpoint(request.param, folder / "exact", **CHANGES[request.param])
    checkpoint, weights = ON_DISK[request.param](exact, folder / "model")
    float32 = {name: tensor.float() for name, tensor in weights.items()}
    save_file(float32, exact / "model.safetensors", metadata={"format": "pt"})
    adapters = write_adapters(folder, request.param, checkpoint)
    words = ("model=auto", f"model.path={checkpoint}", "lora=none", *UNREADABLE.get(request.param, ()))
    with launched(*words, f"lora.adapters.everything.path={adapters['everything']}", runs=folder / "runs") as running:
        yield Served(running, exact, adapters)


class HuggingFace(Float32Model):
    """With its tokenizer."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer

        super().__init__(checkpoint)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def decided(self) -> dict[str, torch.Tensor]:
        """Logprobs (V,) of the next token, of the first prompts whose routing is decided everywhere."""
        found = {}
        for prompt in PROMPTS:
            logprobs_V, decided = self.answer(self._tokenizer(prompt, return_tensors="pt").input_ids)
            if decided:
                found[prompt] = logprobs_V
            if len(found) == COMPARED:
                return found
        raise AssertionError(f"too few prompts with decided routing: {list(found)}")


def check(served: Served, name: str | None, expected: dict[str, torch.Tensor]) -> None:
    """Served logprobs against those expected of each prompt."""
    for prompt, expected_V in expected.items():
        errors = errors_in_sigmas(served.running.logprobs(prompt, name)[0], expected_V)
        shown = f"{name} {prompt!r}: max {float(errors.max()):.2f}, mean {float(errors.mean()):.2f} deviations"
        print(shown)
        assert errors.max() < 5, shown
        assert errors.mean() < 1.5, shown


def merged(served: Served, name: str, target: Path) -> dict[str, torch.Tensor]:
    """Of the checkpoint that action=merge makes."""
    base = read_checkpoint(served.exact)
    assert merge(ExpertSource(base), import_adapter(served.adapters[name], base).demand_sound(), target)
    return HuggingFace(target).decided()


def test_the_base_is_the_base(served: Served) -> None:
    check(served, None, served.base)


def test_positions_far_apart_are_those_of_the_base(served: Served) -> None:
    errors = long_errors(served.running, HuggingFace(served.exact))
    assert median(errors) < 5
    assert max(errors) < FAR_OFF


@pytest.mark.parametrize("served", ["deepseek_v3"], indirect=True)
def test_a_scaling_that_the_model_was_not_trained_with_would_be_seen(served: Served, tmp_path: Path) -> None:
    scaled = shutil.copytree(served.exact, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    assert median(long_errors(served.running, HuggingFace(scaled))) > FAR_OFF


def test_an_adapter_on_everything_is_the_merged_checkpoint(served: Served, tmp_path: Path) -> None:
    base = read_checkpoint(served.exact)
    imported = import_adapter(served.adapters["everything"], base)
    assert unserved_parts(imported, base) == {}
    assert {"routed_experts", "attention", "embeddings"} <= {pair.place.kind for pair in imported.pairs.values()}
    check(served, "everything", merged(served, "everything", tmp_path / "merged"))


@pytest.mark.parametrize("name", LOADED)
def test_experts_in_every_format_are_the_merged_checkpoint(served: Served, name: str, tmp_path: Path) -> None:
    check_loaded(served, name, tmp_path)


@pytest.mark.parametrize("served", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_what_other_tools_write_is_the_merged_checkpoint(served: Served, name: str, tmp_path: Path) -> None:
    check_loaded(served, name, tmp_path)


def check_loaded(served: Served, name: str, tmp_path: Path) -> None:
    """Loaded while serving it answers as its merged checkpoint, and unlike the base."""
    body = {"lora_name": name, "lora_path": str(served.adapters[name])}
    answer = served.running.client.post("/load_lora_adapter", json=body)
    assert answer.status_code == 200, answer.text
    check(served, name, merged(served, name, tmp_path / "merged"))
    answers = {prompt: served.running.logprobs(prompt, name)[0] for prompt in served.base}
    moved = [errors_in_sigmas(answers[prompt], bare_V).max() for prompt, bare_V in served.base.items()]
    assert max(moved) > 10
    served.running.client.post("/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
