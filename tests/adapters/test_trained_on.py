"""What an adapter's folder tells of the model that it was trained on: another model of the same shapes, another chat
template, tokens that the base has not. All of them would answer, and none of it as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

from kt_launch.cli import main
from kt_model.checkpoint import read_checkpoint
from kt_model.importer import import_adapter

CACHED = "cache/models--Qwen--Qwen3-30B-A3B/snapshots/0f3c"
ANOTHER: dict[str, list[Any]] = {
    "Qwen3-30B-A3B": ["Qwen/Qwen3-30B-A3B-Base", "unsloth/Qwen3-30B-A3B-Instruct-2507-bnb-4bit", "/data/qwen3_coder/"],
    "DeepSeek-V2-Lite-Chat": ["deepseek-ai/DeepSeek-V2-Lite", r"C:\models\DeepSeek-V2-Lite"],
    CACHED: ["/root/.cache/huggingface/hub/models--Qwen--Qwen3-30B-A3B-Base/snapshots/99aa"],
}
SAME: dict[str, list[Any]] = {
    "Qwen3-30B-A3B": ["Qwen/Qwen3-30B-A3B", "unsloth/qwen3-30b-a3b-unsloth-bnb-4bit", "/data/Qwen3_30B_A3B/", None, ""],
    CACHED: ["Qwen/Qwen3-30B-A3B", "/x/models--Qwen--Qwen3-30B-A3B/snapshots/0f3c", "../Qwen3-30B-A3B-FP8"],
    "mine": ["Qwen/Qwen3-30B-A3B", "/workspace/output/merged", "model"],
    "base_model": ["some/model", "model", 7],
}


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(folder, name) for folder, names in table.items() for name in names]


def warnings(folder: Path, base: Path) -> tuple[str, ...]:
    return import_adapter(folder, read_checkpoint(base)).require_sound().warnings


@pytest.mark.parametrize(("folder", "named"), pairs(ANOTHER))
def test_another_model_of_the_same_shapes_is_warned_of(folder: str, named: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / folder)
    (warning,) = warnings(write_adapter(tmp_path / "a", base_model_name_or_path=named), base)
    assert warning == (
        f"adapter_config.json says that it was trained on {named}, but the model is {base}; equal shapes do not make "
        "equal weights"
    )


@pytest.mark.parametrize(("folder", "named"), pairs(SAME))
def test_the_same_model_by_another_name_is_not(folder: str, named: Any, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / folder)
    assert warnings(write_adapter(tmp_path / "a", base_model_name_or_path=named), base) == ()


def test_a_folder_with_a_name_of_its_own_is_known_by_what_config_json_says(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "mine", _name_or_path="Qwen/Qwen3-30B-A3B")
    adapter = write_adapter(tmp_path / "a", base_model_name_or_path="Qwen/Qwen3-30B-A3B-Base")
    assert len(warnings(adapter, base)) == 1
    link = tmp_path / "Qwen3-30B-A3B-Base"
    link.symlink_to(base)
    assert warnings(adapter, link) == ()


TEMPLATES = {
    "the file": lambda folder, text: (folder / "chat_template.jinja").write_text(f"{text}\n"),
    "tokenizer_config.json": lambda folder, text: (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": text})
    ),
    "several": lambda folder, text: (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": text}]})
    ),
}


@pytest.mark.parametrize("place", TEMPLATES)
def test_another_chat_template_is_warned_of(place: str, tmp_path: Path) -> None:
    base, adapter = write_checkpoint(tmp_path / "m"), write_adapter(tmp_path / "a")
    TEMPLATES[place](adapter, "{{ messages }}")
    (warning,) = warnings(adapter, base)
    assert warning.startswith(f"{base} has no chat template, and chats are worded by the model's; if it was trained ")
    TEMPLATES[place](base, "{{ messages }}")
    assert warnings(adapter, base) == ()
    TEMPLATES[place](base, "{{ messages[0] }}")
    (warning,) = warnings(adapter, base)
    assert warning.startswith(f"its folder has another chat template than {base}, and chats are worded by the model's")
    assert warning.endswith("server.extra_args=[--chat-template,/path/to/file.jinja]")


def test_it_is_said_until_one_is_typed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_checkpoint(tmp_path / "m"), write_adapter(tmp_path / "a")
    TEMPLATES["the file"](adapter, "{{ messages }}")
    words = ["plan", f"model={base}", f"lora={adapter}", "server=cpu", "--json"]
    assert main(words) == 0
    said = [each for each in json.loads(capfd.readouterr().out)["warnings"] if "chat template" in each]
    assert len(said) == 1
    assert said[0].startswith("lora.a: ")
    assert main([*words, f"server.extra_args=[--chat-template,{adapter / 'chat_template.jinja'}]"]) == 0
    assert "has no chat template" not in capfd.readouterr().out


def test_tokens_that_the_model_has_not_are_warned_of(tmp_path: Path) -> None:
    base, adapter = write_checkpoint(tmp_path / "m"), write_adapter(tmp_path / "a")

    def add(folder: Path, tokens: dict[str, str]) -> None:
        table = {number: {"content": text} for number, text in tokens.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))

    add(adapter, {"1": "<s>", "6": "<|im_start|>", "7": "<|im_end|>", "9" * 5000: "x"})
    assert warnings(adapter, base) == ()
    add(base, {"1": "<s>", "5": "<|im_end|>"})
    (warning,) = warnings(adapter, base)
    told = "its tokenizer has tokens that the model's has not, or has under other numbers: "
    assert warning == f"{told}<|im_start|>, <|im_end|>"
