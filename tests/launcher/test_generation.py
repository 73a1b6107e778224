"""What a plan tells of generation_config.json and of the tokenizer's chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_tokenizer
from tiny_files import write_checkpoint
from transformers import AutoTokenizer

from kt_model.chat_template import read_chat_template
from kt_model.generation import read_generation

Launch = Callable[..., Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of the test's own, which it changes."""
    return write_checkpoint(tmp_path / "model")


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def planned(plan: Launch, *words: str) -> Any:
    ended = plan(*words)
    assert ended.code == 0, ended.err
    return ended.plan


def mistake_of(ended: Any) -> str:
    assert (ended.code, ended.out) == (2, "")
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    return str(line.removeprefix("error: "))


@pytest.mark.parametrize(
    ("content", "shown", "source"),
    [
        (None, "temperature 1", "default: OpenAI's"),
        ({"eos_token_id": 1}, "temperature 1", "default: OpenAI's"),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, "temperature 0.6, top_p 0.95", None),
        ({"do_sample": False, "temperature": 0.6, "min_p": 0.1}, "temperature 0, min_p 0.1", None),
        ({"repetition_penalty": 1.1}, "temperature 1, repetition_penalty 1.1", None),
    ],
)
def test_a_plan_shows_what_requests_get_that_they_leave_open(
    content: Any, shown: str, source: str | None, plan: Launch, checkpoint: Path
) -> None:
    if content is not None:
        write(checkpoint, "generation_config.json", content)
    value = planned(plan)["resolved"]["model.sampling"]
    assert value == {"value": shown, "source": source or "probed: generation_config.json"}
    typed = planned(plan, "server.extra_args=[--sampling-defaults,openai]")
    assert "model.sampling" not in typed["resolved"]


def test_what_has_no_effect_or_another_one_than_in_transformers_is_warned_of(plan: Launch, checkpoint: Path) -> None:
    asked = {"no_repeat_ngram_size": 3, "stop_strings": ["x"], "typical_p": 1.0, "num_beams": 1, "eos_token_id": [1]}
    write(checkpoint, "generation_config.json", asked)
    config = json.loads((checkpoint / "config.json").read_text())
    write(checkpoint, "config.json", config | {"eos_token_id": [1, 5]})
    warnings = planned(plan)["warnings"]
    assert (
        "model.path: generation_config.json has no_repeat_ngram_size, stop_strings, by which SGLang does not write "
        "answers" in warnings
    )
    assert any(each.startswith("model.path: answers end at token 5, too, which config.json calls") for each in warnings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"top_p": 0}, "generation_config.json has top_p 0, which SGLang would refuse in every request"),
        ({"temperature": "hot"}, "generation_config.json has temperature 'hot', which SGLang would refuse"),
        ({"repetition_penalty": 3, "min_p": -1}, "has min_p -1, repetition_penalty 3, which SGLang would refuse"),
        ('{"top_p": 0.9,}', "generation_config.json is not readable JSON. Download the file again."),
    ],
)
def test_values_that_every_request_would_fail_of_are_refused(
    content: Any, message: str, plan: Launch, checkpoint: Path
) -> None:
    write(checkpoint, "generation_config.json", content)
    mistake = mistake_of(plan())
    assert mistake.startswith("model.path: ") and message in mistake


def test_of_several_templates_one_has_to_be_the_default(plan: Launch, checkpoint: Path) -> None:
    rows = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(checkpoint, "tokenizer_config.json", {"chat_template": rows})
    mistake = mistake_of(plan())
    assert mistake.endswith(
        "has chat templates rag, tool_use, none of them the default. "
        "Set server.extra_args=[--hf-chat-template-name,rag], or another of them."
    )
    planned(plan, "server.extra_args=[--hf-chat-template-name,rag]")
    write(checkpoint, "tokenizer_config.json", {"chat_template": [*rows, {"name": "default", "template": "c"}]})
    planned(plan)


ROWS = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize("more", [(), ("tool_use",), ("rag", "tool_use")])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("key", [None, "K", ROWS])
def test_templates_are_found_where_transformers_finds_them(
    key: Any, alone: bool, more: tuple[str, ...], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", described | {"chat_template": key})
    if alone:
        write(tmp_path, "chat_template.jinja", "J")
    for name in more:
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        write(tmp_path / "additional_chat_templates", f"{name}.jinja", name)
    found, names = AutoTokenizer.from_pretrained(tmp_path).chat_template, read_generation(tmp_path, {}).templates
    assert set(names) == (set(found) if isinstance(found, dict) else set())
    if not more:
        assert read_chat_template(tmp_path) == (json.dumps(key) if isinstance(found, dict) else found or "")
