"""What clients get from a checkpoint as hubs have them, against transformers in float32: float16 weights with norms and
routers in float32, `dtype` in config.json, ends and sampling in generation_config.json alone, a tokenizer that puts <s>
before a text, has fewer tokens than the embedding, and two chat templates, that for tools first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from launching import Running, launched
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CHAT_TEMPLATE, VOCABULARY, write_checkpoint, write_json
from transformers import AutoTokenizer

pytestmark = pytest.mark.server
PADDED = VOCABULARY + 16
EOS, SECOND_END, CLASS_DEFAULT = 1, 9, 2
"""The tokenizer's end, another one of generation_config.json, and the one that transformers' class has by default."""
FAMILY = "deepseek_v2"
WITH_TOOLS = (
    "<s>{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    '<tool_call>\n{"name": "arguments"}\n</tool_call>{% endif %}'
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message | tojson }}"
    "{% if message['content'] is none %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = "Why does bread rise"
MESSAGES = [{"role": "user", "content": QUESTION}]
TALK = [{"role": "system", "content": "Be short"}, *MESSAGES]
FUNCTION = {"name": "get", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
MANY = 2
"""Tokens, of which the likeliest one leads by more than what bfloat16 rounds."""


def write_real(folder: Path) -> Path:
    """The checkpoint."""
    write_checkpoint(FAMILY, folder, vocab_size=PADDED)
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.float() if "norm" in name or name.endswith(".gate.weight") else tensor.half()
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left_out = ("torch_dtype", "eos_token_id")
    kept = {key: value for key, value in config.items() if key not in left_out}
    write_json(folder / "config.json", kept | {"dtype": "float16"})
    ends = {"bos_token_id": 0, "eos_token_id": [EOS, SECOND_END], "pad_token_id": 2}
    write_json(folder / "generation_config.json", ends | {"do_sample": False, "temperature": 0.7, "top_k": 0})
    described = json.loads((folder / "tokenizer.json").read_text())
    begun = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begun, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begun, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    write_json(folder / "tokenizer.json", described)
    words = json.loads((folder / "tokenizer_config.json").read_text())
    templates = [{"name": "tool_use", "template": WITH_TOOLS}, {"name": "default", "template": CHAT_TEMPLATE}]
    write_json(folder / "tokenizer_config.json", words | {"add_bos_token": True, "chat_template": templates})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real(tmp_path_factory.mktemp("real") / "model")


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with launched(f"model={checkpoint}", runs=tmp_path_factory.mktemp("runs")) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def post(served: Running, path: str, **body: Any) -> Any:
    answer = served.client.post(path, json={"model": "model", **body})
    assert answer.status_code == 200, f"{path} {body}: {answer.status_code} {answer.text}"
    return answer.json()


def worded(tokenizer: Any, messages: Any, **more: Any) -> list[int]:
    """The tokens that transformers makes of a chat."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    found: list[int] = tokenizer.apply_chat_template(messages, **options, **more)
    return found


def test_the_weights_are_those_of_the_files(served: Running) -> None:
    assert any(line.startswith("proof: whole model: base is transformers' in float32") for line in served.output)


def test_prompts_are_the_tokens_that_transformers_makes(served: Running, tokenizer: Any) -> None:
    def tokens(**body: Any) -> Any:
        return post(served, "/v1/tokenize", **body)["tokens"]

    assert tokens(prompt=QUESTION) == tokenizer(QUESTION).input_ids
    for messages in (MESSAGES, TALK):
        assert tokens(messages=messages) == worded(tokenizer, messages)
        assert tokens(messages=messages, tools=TOOLS) == worded(tokenizer, messages, tools=TOOLS)
    assert tokens(messages=[{**TALK[0], "role": "developer"}, *MESSAGES]) == worded(tokenizer, TALK)
    described = [{"type": "function", "function": {"name": "f", "description": "Gets", "parameters": {}}}]
    assert tokens(messages=TALK, tools=described) == worded(tokenizer, TALK, tools=described)


CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": {"a": 1}}}
SENT = {**CALL, "function": {"name": "get", "arguments": '{"a": 1}'}}
"""The same as OpenAI's clients send it."""
SAID = {"role": "assistant", "content": "Yes"}


@pytest.mark.parametrize("content", [None, "", "See"])
def test_calls_of_tools_are_told_as_they_were_made(served: Running, tokenizer: Any, content: str | None) -> None:
    result = {"role": "tool", "content": "3", "tool_call_id": "c1"}
    talk = [*MESSAGES, {"role": "assistant", "content": content, "tool_calls": [SENT]}, result]
    meant = [*MESSAGES, {"role": "assistant", "content": content or None, "tool_calls": [CALL]}, result]
    for messages, same in ((talk, meant), (talk[:2], meant[:2])):
        tokens = post(served, "/v1/tokenize", messages=messages, tools=TOOLS)["tokens"]
        assert tokens == worded(tokenizer, same, tools=TOOLS)


def test_what_the_assistant_said_last_is_the_assistants(served: Running, tokenizer: Any) -> None:
    """OpenAI's route begins another message, Anthropic's and Ollama's go on from it, as their protocols have it."""
    talk = [*MESSAGES, SAID]
    assert post(served, "/v1/tokenize", messages=talk)["tokens"] == worded(tokenizer, talk)
    begun = len(worded(tokenizer, MESSAGES)) + len(tokenizer("Yes", add_special_tokens=False).input_ids)
    options = {"stream": False, "options": {"num_predict": 1}}
    assert post(served, "/api/chat", messages=talk, **options)["prompt_eval_count"] == begun
    assert post(served, "/v1/messages", messages=talk, max_tokens=1)["usage"]["input_tokens"] == begun


def test_every_route_words_a_prompt_as_transformers_does(served: Running, tokenizer: Any) -> None:
    asked = {"stream": False, "options": {"num_predict": 1}}
    length = len(worded(tokenizer, TALK))
    counted = (
        post(served, "/v1/chat/completions", messages=TALK, max_tokens=1)["usage"]["prompt_tokens"],
        post(served, "/v1/responses", input=QUESTION, instructions="Be short", max_output_tokens=1)["usage"][
            "input_tokens"
        ],
        post(served, "/v1/messages", messages=MESSAGES, system="Be short", max_tokens=1)["usage"]["input_tokens"],
        post(served, "/api/chat", messages=TALK, **asked)["prompt_eval_count"],
        post(served, "/api/generate", prompt=QUESTION, system="Be short", **asked)["prompt_eval_count"],
    )
    assert set(counted) == {length}
    raw = post(served, "/api/generate", prompt=QUESTION, raw=True, **asked)["prompt_eval_count"]
    assert raw == len(tokenizer(QUESTION).input_ids)
    assert post(served, "/api/generate", prompt=" ", system="Be short", **asked)["response"] == ""


def test_a_model_that_is_not_to_be_sampled_from_is_not_on_any_route(served: Running, tokenizer: Any) -> None:
    tokens = worded(tokenizer, MESSAGES)
    greedy = {"max_new_tokens": MANY, "temperature": 0}
    whole = post(served, "/generate", input_ids=tokens, sampling_params=greedy)["text"]
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none")
    ollama = {"stream": False, "options": {"num_predict": MANY, "temperature": None}}
    for _again in range(2):
        chat = client.chat.completions.create(model="model", messages=MESSAGES, max_tokens=MANY)
        completion = client.completions.create(model="model", prompt=tokens, max_tokens=MANY)
        response = client.responses.create(model="model", input=QUESTION, max_output_tokens=MANY)
        (said,) = post(served, "/v1/messages", messages=MESSAGES, max_tokens=MANY)["content"]
        texts = {
            "chat": chat.choices[0].message.content,
            "completions": completion.choices[0].text,
            "responses": response.output_text,
            "anthropic": said["text"],
            "ollama chat": post(served, "/api/chat", messages=MESSAGES, **ollama)["message"]["content"],
            "ollama generate": post(served, "/api/generate", prompt=QUESTION, **ollama)["response"],
        }
        assert texts == dict.fromkeys(texts, whole)
    hot = {"temperature": 2.5, "top_k": -1, "seed": 4}
    other = post(served, "/v1/completions", prompt=tokens, max_tokens=MANY, **hot)["choices"][0]["text"]
    asked = {"num_predict": MANY, "temperature": 2.5, "seed": 4}
    assert other != whole
    assert post(served, "/api/chat", messages=MESSAGES, stream=False, options=asked)["message"]["content"] == other


@pytest.mark.parametrize(
    ("token", "ends"), [(EOS, True), (SECOND_END, True), (CLASS_DEFAULT, False), (7, False), (PADDED - 1, False)]
)
def test_an_answer_ends_where_the_files_say(served: Running, token: int, ends: bool) -> None:
    (choice,) = post(
        served, "/v1/chat/completions", messages=MESSAGES, max_tokens=3, logit_bias={str(token): 100}, logprobs=True
    )["choices"]
    assert choice["finish_reason"] == ("stop" if ends else "length")
    assert len(choice["logprobs"]["content"]) == (1 if ends else 3)


def test_special_tokens_are_shown_on_request(served: Running, tokenizer: Any) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "logit_bias": {"4": 100}}
    for skip in (True, False):
        answer = post(served, "/v1/chat/completions", **body, skip_special_tokens=skip)
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode([4, 4], skip_special_tokens=skip)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get"}}])
def test_a_call_that_is_cut_short_is_not_lost(served: Running, choice: Any) -> None:
    """Both answers have three tokens of the mark that a call begins with."""
    body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 3}
    (whole,) = post(served, "/v1/chat/completions", **body)["choices"]
    assert (whole["finish_reason"], whole["message"].get("tool_calls")) == ("length", None)
    streamed = served.client.post("/v1/chat/completions", json={"model": "model", "stream": True, **body}).text
    lines = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")]
    parts = [choice for line in lines for choice in line["choices"]]
    assert parts[-1]["finish_reason"] == "length"
    for text in (whole["message"]["content"], "".join(part["delta"].get("content") or "" for part in parts)):
        assert len(text) >= 3 and "<tool_call>\n".startswith(text)
    (item,) = post(
        served, "/v1/responses", input=QUESTION, tools=[{"type": "function", **FUNCTION}], tool_choice="required",
        max_output_tokens=3,
    )["output"]  # fmt: skip
    assert "<tool_call>\n".startswith(item["content"][0]["text"])


def other_logprobs(served: Running, **asked: Any) -> list[dict[str, float]]:
    """Of an answer that consists of one token: by step, token → logprob of those that were not chosen. They rise by
    what a penalty takes from the chosen one, whose own is nearly 0."""
    body = {"messages": MESSAGES, "max_tokens": 4, "logit_bias": {"40": 60}, "logprobs": True, "top_logprobs": 5}
    (choice,) = post(served, "/v1/chat/completions", **body, **asked)["choices"]
    assert {step["token"] for step in choice["logprobs"]["content"]} == {choice["logprobs"]["content"][0]["token"]}
    return [
        {each["token"]: each["logprob"] for each in step["top_logprobs"][1:]} for step in choice["logprobs"]["content"]
    ]


@pytest.mark.parametrize(
    ("penalty", "by"),
    [
        ("frequency_penalty", [0.0, 0.5, 1.0, 1.5]),
        ("presence_penalty", [0.0, 0.5, 0.5, 0.5]),
    ],
)
def test_a_penalty_counts_every_token_of_the_answer(served: Running, penalty: str, by: list[float]) -> None:
    bare, fined = other_logprobs(served), other_logprobs(served, **{penalty: 0.5})
    for step, expected in enumerate(by):
        common = bare[step].keys() & fined[step].keys()
        assert common
        assert [fined[step][token] - bare[step][token] for token in common] == pytest.approx(
            [expected] * len(common), abs=0.05
        )


def test_an_answer_has_at_least_min_tokens(served: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "logit_bias": {str(EOS): 100}}
    for least in (0, 1, 3):
        answer = post(served, "/v1/chat/completions", **body, min_tokens=least)
        assert answer["usage"]["completion_tokens"] == least + 1


def test_anthropics_clients_are_told_which_text_ended_an_answer(served: Running) -> None:
    said = post(served, "/v1/messages", messages=MESSAGES, max_tokens=MANY)["content"][0]["text"]
    body = {"model": "model", "messages": MESSAGES, "max_tokens": MANY, "stop_sequences": ["never", said]}
    whole = post(served, "/v1/messages", **body)
    assert (whole["stop_reason"], whole["stop_sequence"], whole["content"][0]["text"]) == ("stop_sequence", said, "")
    lines = served.client.post("/v1/messages", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    (delta,) = [event["delta"] for event in events if event["type"] == "message_delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": said}
    assert events[-1]["type"] == "message_stop"
    other = post(served, "/v1/messages", messages=MESSAGES, max_tokens=MANY, stop_sequences=["never"])
    assert (other["stop_reason"], other.get("stop_sequence")) == ("max_tokens", None)


def test_ollamas_answers_may_be_as_long_as_there_is_room(served: Running) -> None:
    talk = [{"role": "user", "content": "a b " * 1200}]
    answer = post(served, "/api/chat", messages=talk, stream=False, options={"stop": ["a", "e", "i", "o", " "]})
    assert answer["prompt_eval_count"] > 2048
