"""A checkpoint that lacks a tensor is refused by the plan, by name, as far as names tell; what no name tells, the
server finds when it has loaded (tests/plugin/test_unwritten_weights.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_checkpoint

from kt_model.checkpoint import read_checkpoint

Launch = Callable[..., Any]

ONE = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.layers.1.mlp.gate.weight",
)
HEAD = "lm_head.weight"


def planned(launch: Launch, path: Path) -> Any:
    return launch("action=plan", "server.device=cpu", "model=auto", f"model.path={path}")


def refused(launch: Launch, path: Path, *names: str) -> str:
    """What the plan says of a checkpoint without these."""
    ended = planned(launch, path)
    assert ended.code == 2
    line: str
    (line,) = ended.err.splitlines()
    assert f"model.path: {path} lacks" in line
    assert all(name in line for name in names)
    return line


@pytest.mark.parametrize("name", ONE)
def test_a_tensor_that_is_missing_is_named(launch: Launch, tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path / "model", leave_out=[name])
    line = refused(launch, path, name)
    assert line.endswith(f"lacks 1 tensor of the model: {name}. Download the whole checkpoint again.")


def test_several_are_counted(launch: Launch, tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "model", "mixtral", leave_out=[*ONE[:4], "model.layers.2.block_sparse_moe.gate.weight"]
    )
    assert "lacks 5 tensors of the model: " in refused(launch, path, *ONE[:3])


def test_a_head_that_is_missing_is_refused_unless_it_is_the_embedding(launch: Launch, tmp_path: Path) -> None:
    untied = write_checkpoint(tmp_path / "untied", leave_out=[HEAD])
    assert 'config.json says "tie_word_embeddings": true' in refused(launch, untied, HEAD)
    for missing in (HEAD, "model.embed_tokens.weight"):
        tied = write_checkpoint(tmp_path / missing, leave_out=[missing], tie_word_embeddings=True)
        assert planned(launch, tied).code == 0
    both = write_checkpoint(tmp_path / "both", leave_out=[HEAD, "model.embed_tokens.weight"], tie_word_embeddings=True)
    refused(launch, both, HEAD, "model.embed_tokens.weight")


def test_a_tied_head_counts_in_the_memory(tmp_path: Path) -> None:
    """SGLang holds it as a matrix of its own."""
    stored = read_checkpoint(write_checkpoint(tmp_path / "stored"))
    tied = read_checkpoint(write_checkpoint(tmp_path / "tied", leave_out=[HEAD], tie_word_embeddings=True))
    assert tied.other_bytes == stored.other_bytes


@pytest.mark.parametrize("dense", [0, 1, 2])
def test_layers_with_experts_and_without_may_differ(launch: Launch, tmp_path: Path, dense: int) -> None:
    assert planned(launch, write_checkpoint(tmp_path / "model", first_k_dense_replace=dense)).code == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_weights_that_are_integers_are_refused(dtype: str, launch: Launch, tmp_path: Path) -> None:
    """What a tool of one's own has quantized beside the experts; SGLang takes the codes for the values."""
    from safetensors.numpy import load_file, save_file

    path = write_checkpoint(tmp_path / "model")
    file, name = path / "model.safetensors", "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(file)
    later = {"model.layers.3.self_attn.o_proj.weight": tensors[name].astype(dtype)}  # for speculation, never loaded
    save_file(tensors | later, file)
    assert planned(launch, path).code == 0
    save_file(tensors | {name: tensors[name].astype(dtype)}, file)
    ended = planned(launch, path)
    kind = {"int8": "I8", "uint8": "U8"}[dtype]
    assert f"model.path: {path} has weights of type {kind}, expected BF16, F16, F32: {name}. Use the" in ended.err
    assert ended.code == 2
