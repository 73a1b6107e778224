"""docs/training.md: its code trains routed experts, on a tiny model, and what comes out is read as the page says."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from docs_pages import ROOT
from tiny_checkpoints import write_checkpoint

from kt_launch.cli import main

PAGE = ROOT / "docs" / "training.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("training") / "model")


def block(checkpoint: Path) -> str:
    """The page's Python, on the tiny model."""
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(text).replace("/models/DeepSeek-V2-Lite-Chat", str(checkpoint))


def train_and_inspect(checkpoint: Path, folder: Path, code: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """One step, saved; what action=inspect says of it."""
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    model = names["model"]
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    model.save_pretrained(folder)
    capsys.readouterr()
    words = ["model=auto", f"model.path={checkpoint}", f"lora.path={folder}", "format=json"]
    assert main(["action=inspect", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return dict(found)


def test_peft_reaches_the_experts(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train_and_inspect(checkpoint, tmp_path / "west", block(checkpoint), capsys)
    assert found["keys"]["routed_experts"] > 0 and found["keys"]["attention"] > 0
    assert found["zero_filled"] == 0 and found["not_served"] == {} and found["errors"] == []
    assert set(found["experts_covered"].values()) == {found["experts"]}
    assert found["delta_norms"]["down"]["mean"] > 0


def section(name: str) -> str:
    """Of the page, the part below a heading."""
    return PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def of_llama_factory() -> dict[str, Any]:
    """What the settings of its part of the page become in PEFT: model/adapter.py of 0.9.5."""
    settings = yaml.safe_load("\n".join(re.findall(r"^    (\w+: .*)$", section("LLaMA-Factory"), re.MULTILINE)))
    return {"target_modules": settings["lora_target"].split(","), "r": settings["lora_rank"], "lora_dropout": 0.0}


def of_swift() -> dict[str, Any]:
    """pipelines/train/tuner.py of 4.6.0; the default of its dropout is 0.05."""
    (command,) = re.findall(r"^    swift sft (?:.*\\\n)*.*$", section("ms-swift"), re.MULTILINE)
    parsed = argparse.ArgumentParser()
    parsed.add_argument("--target_modules", nargs="+", default=["all-linear"])
    parsed.add_argument("--target_parameters", nargs="+")
    parsed.add_argument("--lora_rank", dest="r", type=int)
    parsed.add_argument("--lora_dropout", type=float, default=0.05)
    known, rest = parsed.parse_known_args(shlex.split(command.replace("\\\n", " "))[2:])
    assert rest == ["--model", "/models/Qwen3-30B-A3B", "--tuner_type", "lora"]
    return vars(known)


def of_unsloth() -> dict[str, Any]:
    """get_moe_target_parameters of 2026.10 names the fused parameters by these modules, as PEFT does."""
    (names,) = re.findall(r"target_modules=(\[.*?\])", section("Unsloth"), re.DOTALL)
    return {"target_modules": ast.literal_eval(names), "r": 16, "lora_dropout": 0.0}


@pytest.mark.parametrize("settings", [of_llama_factory, of_swift, of_unsloth])
def test_what_other_tools_hand_to_peft_reaches_the_experts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Callable[[], dict[str, Any]]
) -> None:
    code = re.sub(r"LoraConfig\(.*?\n\)", lambda _: f"LoraConfig(**{settings()})", block(checkpoint), flags=re.DOTALL)
    found = train_and_inspect(checkpoint, tmp_path / "west", code, capsys)
    assert found["keys"]["routed_experts"] > 0 and found["keys"]["attention"] > 0
    assert found["zero_filled"] == 0 and found["not_served"] == {} and found["errors"] == []


@pytest.mark.parametrize(
    ("targets", "router"), [('["gate_proj", "up_proj", "down_proj"]', False), ('"all-linear"', True)]
)
def test_old_names_are_translated_and_all_linear_takes_the_router(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: str, router: bool
) -> None:
    code = re.sub(r"target_modules=.*\n *target_parameters=.*\n", f"target_modules={targets},\n", block(checkpoint))
    found = train_and_inspect(checkpoint, tmp_path / "west", code, capsys)
    assert found["keys"]["routed_experts"] > 0
    assert ("router" in found["not_served"]) == router
