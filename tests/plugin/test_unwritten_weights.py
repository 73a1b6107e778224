"""A weight of the served model that nobody wrote, or that is no number, ends the start by name: tried with each weight
of each family on the model as SGLang makes it. As a user meets it: tests/bench/test_bench.py, and here at night."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS, write_checkpoint, write_unwritten

from kt_sglang.checkpoint.tied_head import with_stand_ins
from kt_sglang.checkpoint.unwritten_weights import is_finite

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = ("deepseek_v2", "mixtral")
"""SGLang's model of the one shares the module, that of the other does not."""
HEADS: dict[str, dict[str, bool]] = {
    "embedding": {f"head is {EMBEDDING}": True, f"embedding is {EMBEDDING}": True},
    "head": {f"head is {HEAD}": True, f"embedding is {HEAD}": True},
    "both": {
        f"head is {EMBEDDING}": False,
        f"head is {HEAD}": True,
        f"embedding is {EMBEDDING}": True,
        f"embedding is {HEAD}": False,
    },
}
SUPPORT = Path(__file__).parents[1] / "support"
BROKEN = "model.layers.1.self_attn.o_proj.weight"
EACH_WEIGHT = """
import dataclasses, json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from sglang_in_process import forked, load, prepare

def each_weight(folder):
    runner = load(folder)
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from kt_model.errors import LaunchError
    from kt_sglang.checkpoint import unwritten_weights
    base, model = unwritten_weights.served_checkpoint(), runner.model
    stored = {name: each for name, each in load_file(folder / "model.safetensors").items() if ".experts." not in name}
    message = {}
    for missing in ["nothing", *stored]:
        without = {name: place for name, place in base.located.items() if name != missing}
        unwritten_weights.served_checkpoint = lambda: dataclasses.replace(base, located=without)
        unwritten_weights.after_initialize_model(model, runner.model_config)
        try:
            DefaultModelLoader.load_weights_only(model, [(n, t) for n, t in stored.items() if n != missing], None)
            message[missing] = ""
        except LaunchError as error:
            message[missing] = str(error)
    stored[BROKEN][3, 5] = float("nan")
    save_file(load_file(folder / "model.safetensors") | stored, folder / "model.safetensors")
    unwritten_weights.served_checkpoint = lambda: base
    try:
        DefaultModelLoader.load_weights_only(model, stored.items(), None)
    except LaunchError as error:
        message["broken"] = str(error)
    print(json.dumps({"family": folder.name, "message": message}))

def infinity(folder):
    from kt_model.errors import LaunchError
    try:
        load(folder)
    except LaunchError as error:
        print(json.dumps({"family": folder.name, "message": {"infinity": str(error)}}))

def head(folder):
    model = load(folder).model
    stored = load_file(folder / "model.safetensors")
    values = {"head": model.lm_head.weight, "embedding": model.model.embed_tokens.weight}
    same = {f"{part} is {name}": bool((value == stored[name]).all()) for part, value in values.items() for name in NAMES
        if name in stored}
    print(json.dumps({"family": folder.name, "message": same}))

prepare()
for folder in map(Path, sys.argv[1:]):
    look = head if "tied" in folder.name else infinity if "infinity" in folder.name else each_weight
    assert forked(lambda: look(folder)), folder
"""


@pytest.fixture(scope="module")
def message(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Family -> tensor that was left out -> what was said."""
    root = tmp_path_factory.mktemp("families")
    folders = [str(write_checkpoint(family, root / family)) for family in CONFIGS]
    folders += [str(write_tied(family, root, stored)) for family in TIED for stored in HEADS]
    folders.append(str(write_infinity(root / "infinity")))
    given = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); BROKEN = {BROKEN!r}; NAMES = {(EMBEDDING, HEAD)!r}"
    code = f"{given}\n{EACH_WEIGHT}"
    done = subprocess.run([sys.executable, "-P", "-c", code, *folders], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"family"')]
    return {each["family"]: each["message"] for each in found}


def write_infinity(folder: Path) -> Path:
    """A checkpoint with a number that is none in one expert."""
    file = write_checkpoint("qwen3_moe", folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.experts.7.down_proj.weight"][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_tied(family: str, root: Path, stored: str) -> Path:
    """A checkpoint whose config.json ties the head; stored: which of the two it has."""
    folder = write_checkpoint(family, root / f"{family} tied, {stored}", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if stored != "embedding":
        tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    if stored == "head":
        del tensors[EMBEDDING]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("stored", HEADS)
@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_has_the_values_that_transformers_gives_it(
    family: str, stored: str, message: dict[str, dict[str, Any]]
) -> None:
    """Each its own where both are stored, and the one that is stored where there is one."""
    assert message[f"{family} tied, {stored}"] == HEADS[stored]


@pytest.mark.parametrize("family", CONFIGS)
def test_each_weight_that_nobody_wrote_is_named(family: str, message: dict[str, dict[str, Any]]) -> None:
    answers = dict(message[family])
    assert answers.pop("nothing") == ""
    assert f"is broken: NaN or infinity in 1 tensor: {BROKEN}. Download these files again" in answers.pop("broken")
    assert len(answers) > 20
    for missing, text in answers.items():
        assert f"provides no values for 1 tensor of the model: {missing}. Download the whole checkpoint again" in text


BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_told_from_what_is_none(dtype: torch.dtype) -> None:
    for value in BAD:
        for place in (0, 37, -1):
            values = torch.randn(7, 33).to(dtype)
            assert is_finite(values)
            values.view(-1)[place] = value
            assert not is_finite(values)
    assert is_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype)), "a large number is one"


def test_one_matrix_is_loaded_into_both_places() -> None:
    stored = {"model.embed_tokens.weight": torch.ones(2), "model.norm.weight": torch.zeros(2)}
    found = dict(with_stand_ins(stored.items(), {"lm_head.weight": "model.embed_tokens.weight"}))
    assert list(found) == ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert found["lm_head.weight"] is stored["model.embed_tokens.weight"]


UNWRITTEN = "{} provides no values for 3 tensors of the model: model.layers.0.self_attn.q_norm.weight, "
INFINITY = "{} is broken: NaN or infinity in expert 7 of layer 2. Download "


def test_infinity_in_an_expert_is_named(message: dict[str, dict[str, Any]]) -> None:
    assert INFINITY.format("infinity") in message["infinity"]["infinity"]


@pytest.mark.server
@pytest.mark.nightly
@pytest.mark.parametrize(("write", "said"), [(write_unwritten, UNWRITTEN), (write_infinity, INFINITY)])
def test_a_start_that_would_serve_them_ends_with_their_names(
    write: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "model")
    words = ("model=auto", f"model.path={checkpoint}", "lora=none", "proof.whole_model=off", "proof.text=warn")
    code, _, errors = finish(*words, runs=tmp_path / "runs")
    assert code == 3, errors
    assert f"error: model.path: {said.format(checkpoint)}" in errors
    assert "its log is " in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "runs").rglob("packed")), "nothing of it is kept in the packed cache"
