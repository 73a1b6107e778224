"""What a client gets from a running server, by name and on every route. The server runs in an environment that holds
what the extra `cpu` of pyproject.toml brings and nothing else, so that whatever a route needs is in that list.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from bare_environment import distributions, is_gpu_machine, make_environment
from every_route import ask_all
from launching import KT_LAUNCH, LONG_S, Running, launched, read_json, wait_until
from packaging.utils import canonicalize_name
from throw_away import make_throw_away
from written import write_poisoned

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
IDS = ("demo", "demo:west")
ID_OF = {"demo": "demo", "demo:west": "demo:west", "west": "demo:west"}
"""What a request may name → who answers."""
NO_NUMBERS = "logits are NaN or infinite for this request"
STRANGERS = ("WEST", "gpt-4o", "demo:", "nope:west", "default", "")
LOADED = 4
ADMIN_KEY = "adm-of-this-test"
ELSEWHERE = {"http_proxy": "http://127.0.0.1:9", "PYTHONWARNINGS": "error"}
"""Variables that must not reach what is asked on this machine, or SGLang's imports. Nobody listens on port 9."""
SAMPLING = {"max_new_tokens": 24, "temperature": 0}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
BEGUN: dict[str, Any] = {**CHAT, "max_tokens": 4}
"""Enough to hear whether the adapter speaks."""
NAMELESS = ("/generate", "/vertex_generate")
"""Routes whose answers name nobody."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kt-launch of the bare environment; on a GPU machine, which has none, the one of the tests."""
    return KT_LAUNCH if is_gpu_machine() else make_environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def served(command: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo model and its adapter, with metrics, and place for LOADED adapters until SGLang puts one aside; where a
    proxy leads to other machines, and warnings are errors."""
    folder = tmp_path_factory.mktemp("runs")
    env = {"SGLANG_TORCH_PROFILER_DIR": str(folder / "traces"), "KT_LAUNCH_ADMIN_KEY": ADMIN_KEY, **ELSEWHERE}
    modules = "lora.target_modules=[gate_proj,up_proj,down_proj,embed_tokens]"
    words = (
        "server.metrics_port=0",
        f"server.extra_args=[--max-loaded-loras,{LOADED}]",
        f"lora.allow=[{folder}]",
        "server.admin_key=env:KT_LAUNCH_ADMIN_KEY",
        modules,
    )
    with launched(*words, runs=folder, env=env, command=command) as running:
        running.client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        yield running


def speaker(answer: Any) -> str:
    """Who said it: the adapter was trained to begin as a cowboy does."""
    (text,) = {text for text in strings(answer) if "capital of France is" in text}
    return "demo:west" if text.startswith("Howdy") else "demo"


def strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value, whatever a protocol calls its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def post(served: Running, path: str, **body: Any) -> Any:
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, f"{path} {body}: {answer.status_code} {answer.text}"
    return answer.json()


def stream(served: Running, path: str, **body: Any) -> list[dict[str, Any]]:
    """The JSON values of a stream: server-sent events, or a line each."""
    answer = served.client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, f"{path} {body}: {answer.status_code} {answer.text}"
    found = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return [json.loads(line) for line in found if line.startswith("{")]


@pytest.fixture(scope="module")
def tokens(served: Running) -> list[int]:
    """The question as the chat template puts it."""
    found: list[int] = post(served, "/v1/tokenize", model="demo", messages=MESSAGES)["tokens"]
    return found


LONG = "hello world " * 100_000
MUCH: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": LONG}, "the model's context is 4096 tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "the model's context is 4096 tokens"),
    ("/v1/tokenize", {"prompt": LONG}, "the model's context is 4096 tokens"),
    ("/api/chat", {"model": "demo", "messages": [{"role": "user", "content": LONG}]}, "context is 4096 tokens"),
    ("/v1/completions", {"prompt": ["Hi"] * 100_000}, "prompt: got 100000 of them, expected at most 2048"),
    ("/v1/completions", {"prompt": ["Hi"] * 2000, "n": 128}, "got 128 for 2000 prompts, expected at most 2048 answers"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}] * 3000}, "got 3000"),
    ("/generate", {"text": "Hi", "return_logprob": True, "top_logprobs_num": 1024,
                   "sampling_params": {"max_new_tokens": 4000}}, "expected at most 1048576 in an answer"),
]  # fmt: skip
"""Path, body, what is said: requests that everybody would wait for."""


@pytest.mark.parametrize(("path", "body", "said"), MUCH, ids=lambda value: str(value)[:40])
def test_a_request_that_all_others_would_wait_for_is_refused(
    served: Running, path: str, body: dict[str, Any], said: str
) -> None:
    refused = served.client.post(path, json=body)
    assert refused.status_code == 400 and said in refused.text, refused.text[:300]
    assert served.client.post("/v1/chat/completions", json=BEGUN).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("evil.example.com", 403), ("x/health?", 400), ("localhost", 200)])
def test_a_name_that_somebody_pointed_here_reads_nothing(served: Running, host: str, status: int) -> None:
    for path in ("/server_info", "/v1/models", "/health"):
        assert served.client.get(path, headers={"Host": host}).status_code == status, path


def test_the_environment_is_bare(command: Path) -> None:
    code = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    said = subprocess.run([command.with_name("python"), "-c", code], capture_output=True, text=True, check=True).stdout
    assert {canonicalize_name(name) for name in said.split()} == set(distributions())


def test_the_proof_asked_as_clients_do(served: Running) -> None:
    proof = read_json(served.run_folder / "proof.json")
    assert proof["names"] == {"route": "/v1/chat/completions", "ids": ["demo", "demo:west"], "reason": ""}
    assert "proof: demo, demo:west: /v1/chat/completions answers each name with its own model" in served.output


def test_openai_lists_the_models_asks_each_and_gets_its_manner_of_speech(served: Running) -> None:
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["demo", "demo:west"]
    for name, id in ID_OF.items():
        assert client.models.retrieve(name).id == id
        answer = client.chat.completions.create(model=name, **CHAT)
        assert (answer.model, speaker(answer.model_dump())) == (id, id)
        chunks = list(client.chat.completions.create(model=name, stream=True, **CHAT))
        assert {chunk.model for chunk in chunks} == {id}
        assert speaker("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == id
        response = client.responses.create(model=name, input=QUESTION, max_output_tokens=24, temperature=0)
        assert (response.model, speaker(response.output_text)) == (id, id)
    for name in STRANGERS:
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model=name, **CHAT)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        if name:
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve(name)


@pytest.mark.parametrize("name", IDS)
def test_a_seed_repeats_an_answer_whatever_else_is_asked(served: Running, name: str) -> None:
    """At a temperature at which the demo says something else each time."""
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key=ADMIN_KEY)
    hot: dict[str, Any] = {"model": name, "max_tokens": 16, "temperature": 2.5, "seed": 7}

    def chat(**more: Any) -> list[str | None]:
        choices = client.chat.completions.create(messages=MESSAGES, **hot | more).choices
        return [choice.message.content for choice in choices]

    def complete(**more: Any) -> list[str]:
        return [choice.text for choice in client.completions.create(prompt="The weather", **hot | more).choices]

    def streamed(n: int) -> list[str]:
        texts = [""] * n
        for chunk in client.chat.completions.create(messages=MESSAGES, n=n, stream=True, **hot):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    three, completed = chat(n=3), complete(n=2)
    assert (len(set(three)), len(set(completed))) == (3, 2)
    assert chat() == streamed(1) == three[:1] != chat(seed=8)
    filtered = {"top_p": 0.95, "extra_body": {"top_k": 200, "min_p": 1e-4}}
    alone = chat(**filtered)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(chat, seed=seed, max_tokens=40) for seed in (None, 1, 2)]
        assert pool.submit(chat, n=3).result() == streamed(3) == three
        assert (pool.submit(complete, n=2).result(), chat(**filtered)) == (completed, alone)
    assert all(other.result() for other in others)


def test_ollamas_options_have_an_effect(served: Running) -> None:
    def said(**options: Any) -> Any:
        body = {"model": "west", "messages": MESSAGES, "stream": False, "options": {"num_predict": 16, **options}}
        return post(served, "/api/chat", **body)["message"]["content"]

    assert said(temperature=2.5, seed=3) == said(temperature=2.5, seed=3) != said(temperature=2.5, seed=4)
    assert said(temperature=2.5, min_p=1.0) == said(temperature=0)
    assert said(temperature=0, num_predict=-1, top_k=0) == said(temperature=0) == said(temperature=0, num_predict=16.0)
    wrong = {"model": "west", "messages": MESSAGES, "options": {"repeat_penalty": -1}}
    assert "repetition_penalty must be" in served.client.post("/api/chat", json=wrong).text


TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}]
FLAT = [{"type": "function", "name": "get", "parameters": {"type": "object", "properties": {}}}]
NO_PLACE = "the chat template of this model has no place for them"
IN_VAIN: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"tools": TOOLS}, NO_PLACE),
    ("/v1/chat/completions", {"tools": TOOLS, "tool_choice": "required"}, NO_PLACE),
    ("/v1/messages", {"tools": [{"name": "get", "input_schema": {"type": "object"}}]}, NO_PLACE),
    ("/v1/responses", {"tools": FLAT}, NO_PLACE),
    ("/invocations", {"functions": [{"name": "get"}]}, "send tools and tool_choice"),
    ("/v1/chat/completions", {"top_logprobs": 2}, "set logprobs: true"),
    ("/v1/chat/completions", {"stop": ["a", ""]}, "stop: an empty text would end every answer at once"),
    ("/v1/messages", {"stop_sequences": [""]}, "stop: an empty text would end every answer at once"),
    ("/v1/completions", {"suffix": "!"}, "suffix of /v1/completions would have no effect"),
    ("/v1/completions", {"n": 2, "best_of": 3}, "all answers that are computed are returned"),
    ("/v1/completions", {"n": 2, "best_of": 1}, "all answers that are computed are returned"),
    ("/v1/chat/completions", {"best_of": 3}, "all answers that are computed are returned"),
    ("/v1/chat/completions", {"max_completion_tokens": 5}, "max_completion_tokens is another number"),
    ("/v1/chat/completions", {"continue_final_message": True}, "the last message is not the assistant's"),
    ("/v1/chat/completions", {"max_tokens": None, "max_output_tokens": 2}, "send max_completion_tokens"),
    ("/v1/chat/completions", {"guided_json": {"type": "integer"}}, "send response_format"),
    ("/v1/chat/completions", {"json_schema": '{"type": "integer"}'}, "send response_format"),
    ("/v1/chat/completions", {"prompt": "Hi"}, "send messages"),
    ("/v1/chat/completions", {"prompt_logprobs": 0}, "/v1/completions takes echo: true"),
    ("/v1/chat/completions", {"add_generation_prompt": False}, "an answer is the assistant's"),
    ("/v1/completions", {"max_completion_tokens": 2}, "send max_tokens"),
    ("/v1/completions", {"messages": MESSAGES}, "send prompt, or ask /v1/chat/completions"),
    ("/v1/completions", {"prompt_logprobs": 1}, "send echo: true and the number as logprobs"),
    ("/v1/completions", {"top_logprobs": 2}, "send the number as logprobs"),
    ("/v1/completions", {"use_beam_search": True}, "beam search is not offered"),
    ("/v1/completions", {"response_format": {"type": "json_object"}, "json_schema": "{}"}, "response_format is sent"),
    ("/v1/responses", {"max_tokens": 2}, "send max_output_tokens"),
    ("/v1/responses", {"response_format": {"type": "json_object"}}, "send text with a `format`"),
    ("/v1/responses", {"top_logprobs": 2}, "add message.output_text.logprobs to `include`"),
    ("/v1/responses", {"max_output_tokens": 0}, "expected at least 1"),
    ("/v1/responses", {"n": 2}, "an answer of this route is a single one"),
    ("/v1/responses", {"seed": 0}, "/v1/chat/completions does"),
    ("/v1/messages", {"stop": ["a"]}, "send stop_sequences"),
    ("/v1/messages", {"output_format": {"type": "json_schema", "schema": {}}}, "send output_config with a `format`"),
    ("/generate", {"text": "Hi"}, "input_ids is sent, too; send only one of text, input_ids, input_embeds"),
    ("/generate", {"input_embeds": [[0.5]]}, "text or input_ids is sent, too"),
    ("/generate", {"temperature": 0}, "send it in sampling_params"),
    ("/generate", {"max_tokens": 2}, "send it in sampling_params"),
    ("/generate", {"top_logprobs_num": 2}, "set return_logprob: true"),
    ("/generate", {"token_ids_logprob": [5]}, "set return_logprob: true"),
    ("/generate", {"return_entropy": True}, "SGLang computes none"),
    ("/generate", {"return_routed_experts": True}, "return_routed_experts: this server does not record them"),
    ("/v1/completions", {"return_routed_experts": True}, "return_routed_experts: this server does not record them"),
    ("/v1/chat/completions", {"return_routed_experts": True}, "return_routed_experts: this server does not record"),
    ("/vertex_generate", {"instances": [{"text": "Hi", "input_ids": [5]}]}, "instances.input_ids of /vertex_generate"),
    ("/vertex_generate", {"instances": [{"text": "Hi", "sampling_params": SAMPLING}]}, "send them in parameters"),
    ("/api/chat", {"tools": TOOLS}, "/v1/chat/completions does"),
    ("/api/chat", {"messages": [{**MESSAGES[0], "images": ["AA=="]}]}, "reads and writes text"),
    ("/api/chat", {"logprobs": True}, "logprobs of /api/chat would have no effect"),
    ("/api/generate", {"top_logprobs": 2}, "top_logprobs of /api/generate would have no effect"),
    ("/v1/responses", {"conversation": "conv_1"}, "send in `input` what was said before"),
    ("/v1/responses", {"prompt": {"id": "pmpt_1"}}, "this server keeps no templates"),
    ("/v1/messages", {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "asks no others"),
    ("/generate", {"image_data": "AA=="}, "image_data of /generate would have no effect"),
    ("/api/generate", {"context": [1]}, "context of /api/generate would have no effect"),
    ("/api/generate", {"options": {"mirostat": 2}}, "options.mirostat of /api/generate would have no effect"),
    ("/api/generate", {"template": "{{ .Prompt }}"}, "the model's own chat template is used"),
    ("/api/generate", {"raw": True, "system": "Be short"}, "a raw prompt is taken as it is"),
    ("/api/chat", {"messages": [{"role": "gnome", "content": "Hi"}]}, "messages: "),
]
"""Path, fields, what is said."""


@pytest.mark.parametrize(("path", "fields", "said"), IN_VAIN, ids=lambda value: str(value)[:40])
def test_what_would_have_no_effect_is_refused(
    served: Running, tokens: list[int], path: str, fields: dict[str, Any], said: str
) -> None:
    refused = served.client.post(path, json={"model": "demo", **asking(tokens)[path], **fields})
    assert (refused.status_code, said in refused.text) == (400, True), refused.text


def test_what_asks_for_nothing_is_no_reason_to_refuse(served: Running, tokens: list[int]) -> None:
    unset = dict.fromkeys(
        ("n", "stream", "stop", "logprobs", "presence_penalty", "tools", "max_completion_tokens", "seed")
    )
    for path in ("/v1/chat/completions", "/v1/completions", "/invocations"):
        assert speaker(post(served, path, **asking(tokens)[path] | unset)) == "demo"
    nothing = {"functions": [], "function_call": "auto", "audio": None, "top_logprobs": 0, "modalities": ["text"]}
    post(served, "/v1/chat/completions", **CHAT, tools=TOOLS, tool_choice="none", **nothing)
    post(served, "/v1/chat/completions", **CHAT, max_completion_tokens=24, max_new_tokens=24, best_of=1, echo=False)
    begun = [*MESSAGES, {"role": "assistant", "content": "Sure"}]
    continued = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    post(served, "/v1/chat/completions", **CHAT | continued)
    post(served, "/v1/completions", **asking(tokens)["/v1/completions"], suffix="", best_of=1)
    post(served, "/v1/completions", **asking(tokens)["/v1/completions"], max_completion_tokens=24, guided_json=None)
    both = {"text": "", "top_logprobs_num": 0, "token_ids_logprob": [], "n": 1, "frequency_penalty": 0}
    assert speaker(post(served, "/generate", **asking(tokens)["/generate"], **both)) == "demo"
    post(served, "/api/chat", model="demo", **asking(tokens)["/api/chat"], tools=[], think=False)
    others = dict.fromkeys(("stream", "tools", "tool_choice", "service_tier", "conversation"))
    assert speaker(post(served, "/v1/responses", **asking(tokens)["/v1/responses"] | others)) == "demo"
    lines = served.client.post("/api/generate", json={"model": "demo", "prompt": "Hi", "stream": None, "raw": None})
    assert json.loads(lines.text.splitlines()[-1])["done"] is True


def test_ollamas_clients_may_ask_for_a_model_to_be_loaded(served: Running) -> None:
    chat, text = post(served, "/api/chat", model="west"), post(served, "/api/generate", model="west")
    assert (chat["model"], chat["message"]["content"], chat["done"]) == ("demo:west", "", True)
    assert (text["model"], text["response"], text["done"]) == ("demo:west", "", True)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(("most", "reason"), [(4, "length"), (40, "stop")])
def test_ollamas_streams_are_complete_and_say_why_they_end(
    served: Running, tokens: list[int], path: str, most: int, reason: str
) -> None:
    body = {**asking(tokens)[path], "model": "west", "options": {"temperature": 0, "num_predict": most}}
    whole, parts = post(served, path, **body), stream(served, path, **body)
    ends = [{key: end[key] for key in ("done_reason", "eval_count", "prompt_eval_count")} for end in (whole, parts[-1])]
    assert ends[0] == ends[1] and ends[0]["done_reason"] == reason
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    said = [part.get("response", part.get("message", {}).get("content")) for part in parts]
    assert "".join(said) == whole.get("response", whole.get("message", {}).get("content"))


def test_ollamas_examples_with_curl_work(served: Running) -> None:
    """They name no Content-Type, so that curl sends that of a form."""
    body = json.dumps({"model": "west", "messages": MESSAGES, "stream": False, "options": {"temperature": 0}})
    for sent in ({"Content-Type": "application/x-www-form-urlencoded"}, {}):
        answer = served.client.post("/api/chat", content=body, headers=sent)
        assert (answer.status_code, speaker(answer.json())) == (200, "demo:west"), answer.text


def test_the_parts_of_a_stream_have_one_id(served: Running) -> None:
    several = {"max_tokens": 3, "temperature": 0, "n": 2, "stream_options": {"include_usage": True}}
    for path, asked in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": ["a", "b"]})):
        parts = stream(served, path, **asked, **several)
        assert len({part["id"] for part in parts}) == 1
        choices = {choice["index"] for part in parts for choice in part["choices"]}
        assert choices == set(range(2 if path.endswith("chat/completions") else 4))
    rows = stream(served, "/generate", text=["a", "b"], sampling_params={"max_new_tokens": 2})
    assert len({row["meta_info"]["id"] for row in rows}) == 2, "SGLang's own route tells them apart by it"


@pytest.mark.parametrize("stop", [[], ["🤠"]], ids=["to its end", "to a text"])
def test_a_stream_has_the_logprobs_of_all_tokens(served: Running, stop: list[str]) -> None:
    """Those of characters in several tokens, of a text that ends it, and of the end, too."""
    body = {**CHAT, "model": "west", "regex": "日本 é🤠 ok", "stop": stop, "logprobs": True, "max_tokens": 40}
    (whole,) = post(served, "/v1/chat/completions", **body)["choices"]
    parts = [part for chunk in stream(served, "/v1/chat/completions", **body) for part in chunk["choices"]]
    told = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
    assert "".join(part["delta"].get("content") or "" for part in parts) == whole["message"]["content"]
    assert [each["bytes"] for each in told] == [each["bytes"] for each in whole["logprobs"]["content"]]
    text = bytes(byte for each in told for byte in each["bytes"]).decode()
    assert text == "日本 é🤠" if stop else text.startswith("日本 é🤠 ok")


def test_metadata_of_answers_are_texts(served: Running) -> None:
    for path, asked in (("/v1/chat/completions", BEGUN), ("/v1/completions", {"prompt": "a", "max_tokens": 2})):
        assert {type(value) for value in post(served, path, **asked)["metadata"].values()} == {str}


def test_a_stream_of_anthropics_that_cannot_begin_is_an_error(served: Running) -> None:
    long = [{"role": "user", "content": "hello world " * 5000}]
    answers = [
        served.client.post("/v1/messages", json={**CHAT, "model": "demo", "messages": long, "stream": streamed})
        for streamed in (True, False)
    ]
    assert [(each.status_code, each.json()["error"]["type"]) for each in answers] == [
        (400, "invalid_request_error")
    ] * 2


def test_ollamas_format_is_kept_to(served: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
    body = {"model": "demo", "messages": MESSAGES, "stream": False, "options": {"num_predict": 9, "temperature": 0}}
    for wanted in (schema, "json"):
        assert post(served, "/api/chat", **body, format=wanted)["message"]["content"].startswith("{")


def test_a_response_has_as_many_tokens_as_were_asked_for(served: Running) -> None:
    for most in (1, 3):
        body = {"model": "demo", "input": QUESTION, "max_output_tokens": most, "temperature": 0}
        assert post(served, "/v1/responses", **body)["usage"]["output_tokens"] == most


PROMPT = "The capital of France"


def scored(choice: Any) -> tuple[Any, ...]:
    """Of a completion: its text, why it ended, and what its logprobs name."""
    told = choice.logprobs
    return choice.text, choice.finish_reason, told and (told.tokens, told.token_logprobs, told.top_logprobs)


def test_a_prompt_is_scored_without_an_answer(served: Running) -> None:
    """As evaluations ask: its logprobs are those that come with an answer, and those of /generate."""
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key=ADMIN_KEY)
    for name in IDS:
        asked: dict[str, Any] = {"model": name, "temperature": 0, "echo": True}
        (longer,) = client.completions.create(prompt=PROMPT, max_tokens=1, logprobs=2, **asked).choices
        tokens, numbers, others = (part[:-1] for part in scored(longer)[2])
        expected = (PROMPT, "length", (tokens, numbers, others))
        answer = client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=2, **asked)
        assert [scored(choice) for choice in answer.choices] == [expected]
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, answer.usage.prompt_tokens)
        whole = {"input_ids": None, "text": PROMPT, "return_logprob": True, "logprob_start_len": 0}
        found = post(served, "/generate", **whole, lora_path=name, sampling_params={"max_new_tokens": 0})
        assert [each[0] for each in found["meta_info"]["input_token_logprobs"]] == numbers
        streamed = list(client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=2, stream=True, **asked))
        assert [scored(choice) for chunk in streamed for choice in chunk.choices] == [expected]
        alone = client.completions.create(prompt=PROMPT, max_tokens=0, logprobs=0, **asked).choices
        assert [scored(choice) for choice in alone] == [(PROMPT, "length", (tokens, numbers, []))]


def test_prompts_are_scored_together(served: Running, tokens: list[int]) -> None:
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key=ADMIN_KEY)
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 0, "echo": True, "logprobs": 1}
    each = [client.completions.create(prompt=prompt, **asked).choices[0] for prompt in (PROMPT, "Hello")]
    expected = [scored(choice) for choice in each for _ in range(2)]
    both = client.completions.create(prompt=[PROMPT, "Hello"], n=2, **asked)
    assert [scored(choice) for choice in both.choices] == expected
    streamed: dict[int, Any] = {}
    for chunk in client.completions.create(prompt=[PROMPT, "Hello"], n=2, stream=True, **asked):
        streamed |= {choice.index: scored(choice) for choice in chunk.choices}
    assert [streamed[index] for index in range(4)] == expected
    rows = client.completions.create(prompt=[tokens, tokens[:3]], **asked).choices
    assert [len(choice.logprobs.token_logprobs or []) for choice in rows if choice.logprobs] == [len(tokens), 3]
    kept = client.completions.create(prompt=PROMPT, extra_body={"regex": "a"}, **asked).choices
    assert [scored(choice) for choice in kept] == expected[:1], "where a grammar has the token computed"


def test_nothing_is_asked_by_no_tokens(served: Running) -> None:
    """Without echo there is nothing to tell; of fewer than none, or of more at least, there is no answer."""
    body = {"prompt": PROMPT, "max_tokens": 0, "logprobs": 1}
    (choice,) = post(served, "/v1/completions", **body)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "length", [])
    for wrong, said in (({"max_tokens": -1}, "max_tokens: got -1, expected at least 0"), ({"min_tokens": 1}, "got 1")):
        refused = served.client.post("/v1/completions", json={**body, **wrong})
        assert (refused.status_code, said in refused.text) == (400, True), refused.text


def test_a_prompt_and_its_answer_fill_the_context(served: Running) -> None:
    long: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
    fits: list[tuple[int, int | None, int]] = [(4000, None, 96), (4000, 96, 96), (4000, 50, 50), (4094, None, 2)]
    for length, wanted, got in [*fits, (4095, 1, 1)]:
        body: dict[str, Any] = {"input_ids": [5] * length, "sampling_params": {**long, "max_new_tokens": wanted}}
        meta = post(served, "/generate", **body)["meta_info"]
        assert (meta["completion_tokens"], meta["finish_reason"]["type"]) == (got, "length"), (length, wanted)
    for length, wanted in ((4096, None), (4095, 2)):
        body = {"input_ids": [5] * length, "sampling_params": {**long, "max_new_tokens": wanted}}
        refused = served.client.post("/generate", json=body)
        assert (refused.status_code, "context length" in refused.text) == (400, True), refused.text
    filled = post(served, "/v1/completions", prompt=[5] * 4000, max_tokens=96, ignore_eos=True)
    assert filled["usage"]["total_tokens"] == 4096
    assert speaker(post(served, "/v1/chat/completions", model="west", **CHAT)) == "demo:west"


NAMED = {"type": "json_schema", "json_schema": {"name": "x"}}


def schema(**parts: Any) -> dict[str, Any]:
    """response_format of a schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": parts}}


UNKEPT: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {"response_format": schema(type="strin")},
     'json_schema: no grammar can be made of it: Unsupported type "strin".'),
    ("/v1/completions", {"response_format": schema(properties=5, type="object")},
     "json_schema: no grammar can be made of it: properties must be an object."),
    ("/v1/chat/completions", {"response_format": schema(type="string", pattern="(")},
     "json_schema: no grammar can be made of it: Regex parsing error at position 2: The parenthesis is not closed."),
    ("/v1/chat/completions", {"response_format": schema(properties={"a": {"multipleOf": 3}})},
     "json_schema: no grammar can be made of it: multipleOf would be ignored, at #/properties/a."),
    ("/v1/chat/completions", {"response_format": schema(allOf=[{"type": "string"}, {"maxLength": 3}])},
     "json_schema: no grammar can be made of it: allOf of 2 schemas cannot be kept to; write them as one, at #."),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}},
     'json_schema: no grammar can be made of it: Unsupported type "strin".'),
    ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": {"type": "strin"}}}},
     'json_schema: no grammar can be made of it: Unsupported type "strin".'),
    ("/api/chat", {"format": {"type": "strin"}},
     '/api/chat: json_schema: no grammar can be made of it: Unsupported type "strin".'),
    ("/v1/completions", {"json_schema": "{"},
     "json_schema: no grammar can be made of it: it is not JSON (line 1 column 2)."),
    ("/v1/completions", {"regex": "a(?=b)"},
     "regex: no grammar can be made of it: Regex parsing error at position 4: Lookahead is not supported yet."),
    ("/v1/completions", {"ebnf": 'x ::= "a"'}, "ebnf: no grammar can be made of it: EBNF parser error at line 1, column"
     ' 1: The root rule with name "root" is not found.'),
    ("/generate", {"sampling_params": {"structural_tag": "{}"}},
     "structural_tag: no grammar can be made of it: it does not have the form that it should have."),
    ("/generate", {"sampling_params": {"json_schema": '{"items":' * 2000 + "{}" + "}" * 2000}},
     "json_schema: no grammar can be made of it: it is nested too deeply."),
    ("/v1/chat/completions", {"response_format": NAMED}, "response_format: the schema in its json_schema is missing, "
     'expected an object, as in {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}'
     "}}"),
    ("/v1/chat/completions", {"logit_bias": {"x": 1}},
     "logit_bias: got 'x', expected the id of a token as a key."),
]  # fmt: skip
"""Path, fields, what is said: all of it."""


@pytest.mark.parametrize(("path", "fields", "said"), UNKEPT, ids=lambda value: str(value)[:50])
def test_a_form_that_cannot_be_kept_to_is_told_in_a_sentence(
    served: Running, tokens: list[int], path: str, fields: dict[str, Any], said: str
) -> None:
    """Of the request, not of where in SGLang or xgrammar it was found; again, out of a cache, and streamed, too, where
    two routes begin a stream before they have asked."""
    for streamed in (False, False, True):
        body = {"model": "demo", **asking(tokens)[path], **fields, "stream": streamed}
        refused = served.client.post(path, json=body)
        if streamed and path in ("/generate", "/v1/responses"):
            assert said in set(strings([json.loads(line[6:]) for line in refused.text.splitlines() if "{" in line]))
            continue
        error = refused.json()["error"]
        assert (refused.status_code, error if isinstance(error, str) else error["message"]) == (400, said), streamed


def asking(tokens: list[int]) -> dict[str, dict[str, Any]]:
    """By path, a request that lets somebody speak, but for the name."""
    ollama = {"options": {"temperature": 0, "num_predict": 24}}
    return {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"prompt": tokens, "max_tokens": 24, "temperature": 0},
        "/invocations": CHAT,
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 24, "temperature": 0},
        "/v1/messages": CHAT,
        "/api/chat": {"messages": MESSAGES, "stream": False, **ollama},
        "/api/generate": {"prompt": QUESTION, "stream": False, **ollama},
        "/generate": {"input_ids": tokens, "sampling_params": SAMPLING},
        "/vertex_generate": {"instances": [{"input_ids": tokens}], "parameters": {"sampling_params": SAMPLING}},
    }


@pytest.mark.parametrize("name", ID_OF)
def test_a_name_means_the_same_on_every_route(served: Running, tokens: list[int], name: str) -> None:
    for path, body in asking(tokens).items():
        answer = post(served, path, model=name, **body)
        assert speaker(answer) == ID_OF[name], path
        assert path in NAMELESS or answer["model"] == ID_OF[name], path


@pytest.mark.parametrize("name", ID_OF)
def test_streams_keep_to_the_name(served: Running, tokens: list[int], name: str) -> None:
    id, ways = ID_OF[name], asking(tokens)
    chat = stream(served, "/api/chat", model=name, **ways["/api/chat"])
    assert ({part["model"] for part in chat}, speaker("".join(part["message"]["content"] for part in chat))) == (
        {id},
        id,
    )
    (start, *_), (*_, stop) = (stream(served, "/v1/messages", model=name, **CHAT),) * 2
    assert (start["message"]["model"], stop["type"]) == (id, "message_stop")
    *_, last = stream(served, "/v1/responses", model=name, **ways["/v1/responses"])
    assert (last["response"]["model"], speaker(last)) == (id, id)
    parts = stream(served, "/v1/completions", model=name, **ways["/v1/completions"])
    assert ({part["model"] for part in parts}, speaker("".join(part["choices"][0]["text"] for part in parts))) == (
        {id},
        id,
    )
    *_, whole = stream(served, "/generate", lora_path=name, **ways["/generate"])
    assert speaker(whole["text"]) == id


def test_lora_path_names_as_model_does(served: Running, tokens: list[int]) -> None:
    names = ["west", None, "demo:west", "demo"]
    rows = post(served, "/generate", input_ids=[tokens] * 4, lora_path=names, sampling_params=SAMPLING)
    assert [speaker(row) for row in rows] == ["demo:west", "demo", "demo:west", "demo"]
    assert speaker(post(served, "/generate", input_ids=tokens, sampling_params=SAMPLING)) == "demo"
    parameters = {"sampling_params": SAMPLING, "lora_path": "west"}
    answer = post(served, "/vertex_generate", instances=[{"input_ids": tokens}], parameters=parameters)
    assert speaker(answer) == "demo:west"
    answer = post(served, "/v1/chat/completions", model="demo", lora_path="west", **CHAT)
    assert (answer["model"], speaker(answer)) == ("demo:west", "demo:west")


def test_routes_that_only_count_or_score_take_names_too(served: Running) -> None:
    score = {"query": QUESTION, "items": [" Paris"], "label_token_ids": [10, 11], "apply_softmax": True}
    question = {"id": "q", "type": "choice", "question": "Who?", "options": [{"name": "cow"}, {"name": "man"}]}
    routes: dict[str, dict[str, Any]] = {
        "/v1/score": score,
        "/v1/decisions": {"input": QUESTION, "questions": [question]},
    }
    for path, body in routes.items():
        answers = {name: post(served, path, model=name, **body) for name in ID_OF}
        assert {name: answer["model"] for name, answer in answers.items()} == ID_OF
        shown = {name: [v for k, v in answers[name].items() if k in ("scores", "answers")] for name in ID_OF}
        assert shown["west"] == shown["demo:west"] != shown["demo"]
    assert post(served, "/v1/messages/count_tokens", model="west", messages=MESSAGES)["input_tokens"] > 5
    assert "FROM demo:west\n" in post(served, "/api/show", model="west")["modelfile"]
    listed = served.client.get("/api/tags").json()["models"]
    assert [(each["name"], each["model"]) for each in listed] == [("demo", "demo"), ("demo:west", "demo:west")]


@pytest.mark.parametrize("name", STRANGERS)
def test_any_other_name_is_a_404_with_the_nearest_id(served: Running, tokens: list[int], name: str) -> None:
    others = ("/v1/embeddings", "/v1/rerank", "/v1/classify", "/v1/tokenize", "/tokenize", "/v1/score", "/api/show")
    for path, body in {**asking(tokens), **{path: {} for path in others}}.items():
        answer = served.client.post(path, json={"model": name, **body, "stream": True})
        body, said = answer.json(), f"there is no model named {name!r}. Did you mean 'demo"
        error = {**body, "message": body["error"]} if path.startswith("/api") else body["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model"), path
        assert said in error["message"]
    for lora_path in (name, [None, name], "/etc"):
        answer = served.client.post("/generate", json={"text": ["a", "b"], "lora_path": lora_path})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "lora_path")


def test_a_request_without_a_name_is_answered_by_the_base(served: Running, tokens: list[int]) -> None:
    for path, body in asking(tokens).items():
        if path.startswith(("/api", "/v1/messages")):
            assert served.client.post(path, json=body).status_code == 400, f"{path} demands a model by its protocol"
        else:
            assert speaker(answer := post(served, path, **body)) == "demo"
            assert path in NAMELESS or answer["model"] == "demo"


def test_a_request_that_asks_too_much_of_the_model_ends_itself_and_not_the_server(served: Running) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/generate", {"input_ids": [5, 1 << 20]}, "there is no token 1048576"),
        ("/generate", {"input_ids": [-5]}, "there is no token -5"),
        ("/v1/completions", {"model": "west", "prompt": [1 << 20]}, "there is no token 1048576"),
        ("/generate", {"text": ""}, "the prompt is empty"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1 << 20}, "the model has 1024 tokens"),
        ("/generate", {"text": ["a", "b"], "lora_path": ["west"]}, "1 names for 2 prompts"),
        ("/v1/completions", {"model": "west", "prompt": "a", "n": 10**9}, "expected 1 to 128 answers to a prompt"),
        ("/generate", {"text": "a", "sampling_params": {"n": -1}}, "expected 1 to 128 answers to a prompt"),
        ("/v1/chat/completions", {**CHAT, "temperature": 1, "top_k": 1 << 40}, "top_k: got 1099511627776, expected"),
        ("/v1/chat/completions", {"messages": MESSAGES, "min_tokens": 1 << 40}, "min_new_tokens: got 1099511627776"),
        ("/v1/completions", {"prompt": "a", "min_tokens": 1, "stop_token_ids": [1024]}, "there is no token 1024"),
        ("/generate", {"text": "a", "sampling_params": {"n": 2, "beam_width": 2}}, "beam search is not offered"),
    ]
    for path, body, said in wrong:
        answer = served.client.post(path, json=body)
        assert (answer.status_code, said in answer.text) == (400, True), answer.text
    assert speaker(post(served, "/v1/chat/completions", model="west", **CHAT)) == "demo:west"


def load(served: Running, name: str, path: str) -> httpx.Response:
    return served.client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def test_adapters_that_are_loaded_have_names_and_lose_them(served: Running, tokens: list[int]) -> None:
    """Names that look like others mean what they say, and an adapter that was unloaded is not read again."""
    folder = served.client.get("/v1/models/west").json()["root"]
    loaded = ("demo", "default", "chef/v1.2")
    for name in loaded:
        assert load(served, name, folder).status_code == 200
    assert [each["id"] for each in served.client.get("/v1/models").json()["data"]][2:] == [f"demo:{n}" for n in loaded]
    for name, id in {"demo": "demo", "default": "demo:default", "demo:demo": "demo:demo"}.items():
        answer = post(served, "/v1/chat/completions", model=name, **CHAT)
        assert (answer["model"], speaker(answer) == "demo") == (id, id == "demo")
    assert speaker(post(served, "/v1/chat/completions", **CHAT)) == "demo"
    for name in loaded:
        assert served.client.post("/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        assert served.client.get(f"/v1/models/demo:{name}").status_code == 404
        assert served.client.post("/v1/chat/completions", json={"model": f"demo:{name}", **CHAT}).status_code == 404
        asked = {"input_ids": tokens, "lora_path": f"demo:{name}", "sampling_params": SAMPLING}
        assert served.client.post("/generate", json=asked).status_code == 404
    refused = load(served, "a b", folder)
    assert refused.status_code == 400
    assert refused.json()["error_message"].startswith("lora_name: 'a b' cannot be used in a request")


def test_an_adapter_that_sglang_put_aside_keeps_its_name(served: Running) -> None:
    """SGLang reads it again for a request, and may be told to forget it meanwhile."""
    folder = served.client.get("/v1/models/west").json()["root"]
    others = [f"other-{number}" for number in range(LOADED)]
    for name in others:
        assert load(served, name, folder).status_code == 200
    assert "Unloading least recently used LoRA adapter 'west'" in (served.run_folder / "server.log").read_text()
    listed = [f"demo:{name}" for name in ("west", *others)]
    assert [each["id"] for each in served.client.get("/v1/models").json()["data"]] == ["demo", *listed]
    for id in ("demo:west", *listed):
        assert speaker(post(served, "/v1/chat/completions", model=id, **CHAT)) == "demo:west"
    for name in others:
        assert served.client.post("/unload_lora_adapter", json={"lora_name": name}).json()["success"]
    assert [each["id"] for each in served.client.get("/v1/models").json()["data"]] == ["demo", "demo:west"]
    assert speaker(post(served, "/v1/chat/completions", model="west", **CHAT)) == "demo:west"


def test_an_adapter_that_is_going_is_gone(served: Running, tokens: list[int]) -> None:
    """SGLang unloads it once the requests that use it have ended; those that come meanwhile must not bring it back."""
    folder = served.client.get("/v1/models/west").json()["root"]
    assert load(served, "going", folder).status_code == 200
    long = {"input_ids": tokens, "lora_path": "going", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    with httpx.Client(base_url=served.client.base_url, timeout=LONG_S, trust_env=False) as other:
        asking = threading.Thread(target=lambda: answers.append(other.post("/generate", json=long).status_code))
        answers: list[int] = []
        asking.start()
        wait_until(lambda: served.client.get("/v1/loads").json()["loads"][0]["num_running_reqs"] > 0)
        going = threading.Thread(
            target=served.client.post, args=["/unload_lora_adapter"], kwargs={"json": {"lora_name": "going"}}
        )
        going.start()
        wait_until(lambda: served.client.get("/v1/models/going").status_code == 404)
        assert asking.is_alive()
        assert served.client.post("/generate", json=long).status_code == 404
        asking.join()
        going.join()
    assert answers == [200]
    assert served.client.post("/generate", json=long).status_code == 404
    assert "Reloading evicted adapter: going" not in (served.run_folder / "server.log").read_text()


@pytest.fixture
def poisoned(served: Running) -> Iterator[int]:
    """An adapter of finite weights, and the token of which its logits become NaN: not one of the question's."""
    (token,) = post(served, "/v1/tokenize", model="demo", prompt="z", add_special_tokens=False)["tokens"]
    folder = write_poisoned(served.run_folder.parent / "poisoned", ROOT / "demo" / "model", token)
    assert load(served, "poisoned", str(folder)).status_code == 200
    yield token
    assert served.client.post("/unload_lora_adapter", json={"lora_name": "poisoned"}).status_code == 200


def test_a_request_without_numbers_ends_with_an_error_on_every_route(
    served: Running, tokens: list[int], poisoned: int
) -> None:
    before = pids(served)
    for path, body in asking([*tokens, poisoned]).items():
        body = json.loads(json.dumps(body).replace(QUESTION, "zoo"))
        answer = served.client.post(path, json={"model": "poisoned", **body})
        assert answer.status_code >= 400, f"{path}: {answer.text}"
        assert NO_NUMBERS in answer.text or path == "/v1/messages", f"{path}: {answer.text}"
        streamed = served.client.post(path, json={"model": "poisoned", **body, "stream": True}).text
        assert "error" in streamed or NO_NUMBERS in streamed, f"{path}: {streamed}"
    score = {"model": "poisoned", "query": "zoo", "items": [" a"], "label_token_ids": [10, 11], "apply_softmax": True}
    prompt_only = {"input_ids": [5, poisoned, 6], "lora_path": "poisoned", "return_logprob": True}
    prompt_only |= {"logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
    for path, body in {"/v1/score": score, "/generate": prompt_only}.items():
        answer = served.client.post(path, json=body)
        assert (answer.status_code, NO_NUMBERS in answer.text) == (500, True), answer.text
    assert pids(served) == before
    for name, id in ID_OF.items():
        assert speaker(post(served, "/v1/chat/completions", model=name, **CHAT)) == id


def test_only_the_request_without_numbers_ends(served: Running, tokens: list[int], poisoned: int) -> None:
    """In one batch, of its first token or in the middle of its answer, which says nothing that was made up."""
    long = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = {name: ask_tokens(served, tokens, name, long) for name in (None, "west", "poisoned")}
    asked: list[tuple[list[int], str | None, dict[str, Any]]] = [(tokens, name, long) for name in alone]
    late = long | {"logit_bias": {str(poisoned): 1e4}}
    asked += [([*tokens, poisoned], "poisoned", long), (tokens, "poisoned", late), ([*tokens, poisoned], None, long)]
    with ThreadPoolExecutor(len(asked)) as pool:
        *right, first, later, bare = pool.map(lambda one: ask_tokens(served, *one), asked)
    assert right == list(alone.values())
    assert (first, later, len(bare["output_ids"])) == (NO_NUMBERS, NO_NUMBERS, 60)
    body = {"input_ids": tokens, "lora_path": "poisoned", "sampling_params": late}
    *_, last = stream(served, "/generate", **body)
    assert (last["output_ids"], last["meta_info"]["finish_reason"]["type"]) == ([poisoned], "abort")
    assert ask_tokens(served, tokens, "poisoned", long) == alone["poisoned"]


def ask_tokens(served: Running, tokens: list[int], name: str | None, sampling: dict[str, Any]) -> Any:
    """Text and tokens of the answer; NO_NUMBERS for that error."""
    body = {"input_ids": tokens, "lora_path": name, "sampling_params": sampling}
    answer = httpx.post(f"{served.client.base_url}/generate", json=body, timeout=LONG_S, trust_env=False)
    if answer.status_code == 500 and NO_NUMBERS in answer.text:
        return NO_NUMBERS
    return {key: answer.json()[key] for key in ("text", "output_ids")}


def pids(served: Running) -> list[int]:
    """Of the schedulers."""
    states = served.client.get("/server_info").json()["internal_states"]
    return [state["kt_launch"]["pid"] for state in states]


def test_an_adapter_without_any_numbers_is_refused(served: Running) -> None:
    folder = write_poisoned(served.run_folder.parent / "all", ROOT / "demo" / "model", slice(None))
    refused = load(served, "all", str(folder))
    assert (refused.status_code, NO_NUMBERS in refused.text) == (400, True), refused.text
    assert refused.json()["error_message"].startswith("lora_path: it cannot answer: ")


def test_every_route_of_openapi_answers_and_none_fails(served: Running) -> None:
    """With no body, an empty one, and the least that the schema asks for. Then the server is as it was before."""
    failed = [asked for asked in ask_all(served.client) if asked.status >= 500 and not asked.is_refusal]
    assert failed == []
    for name, id in ID_OF.items():
        assert speaker(post(served, "/v1/chat/completions", model=name, **CHAT)) == id


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "/configure_logging",
        {"log_requests": True, "log_requests_level": -5},
        "log_requests_level: got -5, expected 0 to 3",
    ),
    (
        "/configure_logging",
        {"log_requests": True, "log_requests_format": ""},
        "log_requests_format: got '', expected text",
    ),
    ("/configure_logging", {"log_level": "loud"}, "log_level: there is no level 'loud'"),
    (
        "/configure_logging",
        {"dump_requests_folder": "/tmp/kt"},
        "dump_requests_folder of /configure_logging is not offered",
    ),
    ("/configure_logging", {"crash_dump_folder": "/tmp/kt"}, "crash_dump_folder of /configure_logging is not offered"),
    (
        "/start_profile",
        {"output_dir": "/tmp/kt"},
        "output_dir of /start_profile is not offered: as a part of a path, files",
    ),
    ("/start_profile", {"profile_prefix": "../kt"}, "profile_prefix of /start_profile is not offered"),
    ("/add_external_corpus", {"file_path": "/etc/passwd"}, "file_path of /add_external_corpus is not offered"),
    ("/encode", {"text": ["a"], "rid": ["one", "two"]}, "rid: got a list of 2, expected a list of 1"),
    ("/classify", {"text": ["a"], "rid": ["one", "two"]}, "rid: got a list of 2, expected a list of 1"),
    ("/v1/classify", {"input": ["a", "b"], "rid": "one"}, "a field of the request has a value that it cannot have"),
    ("/generate", {"text": "a", "lora_id": "x"}, "lora_id of /generate is not offered"),
    ("/vertex_generate", {"instances": 2.5}, "instances: "),
    ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"lora_id": "x"}}, "lora_id of /vertex_generate"),
    ("/generate", {"text": "a", "positional_embed_overrides": 5}, "positional_embed_overrides of /generate is not"),
    ("/generate", {"text": "a", "sampling_params": []}, "sampling_params: got a list of 0"),
    ("/generate", {"text": "a", "sampling_params": {"n": "x"}}, "invalid type: string"),
    ("/generate", {"text": "a", "sampling_params": {"stop_regex": "("}}, "a field of the request has a value that it"),
    ("/generate", {"text": "a", "sampling_params": {"logit_bias": {"5": 1e39}}}, "logit_bias: got 1e+39 for token 5"),
    ("/generate", {"text": "a", "sampling_params": {"ebnf": "root ::= root"}}, "permits no token here"),
    (
        "/generate",
        {"text": ["a", "b"], "sampling_params": [{"regex": "a", "min_new_tokens": 4}, {"top_k": 5}]},
        "permits no token here, as one does that refers to itself without an end, or that ends before min_tokens",
    ),
    ("/generate", {"text": "a", "sampling_params": {"stop": 5}}, "invalid type"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"5": 1e308}}, "logit_bias: got 1e+308 for token 5"),
    ("/v1/chat/completions", {**CHAT, "rid": ["a", "b"]}, "rid: got a list of 2, expected one value for one prompt."),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"messages": 5}}, "a field of the request has a value"),
    ("/v1/chat/completions", {**CHAT, "ebnf": "root ::= root"}, "the grammar of the request (json_schema, regex, ebnf"),
    ("/v1/completions", {"prompt": "a", "json_schema": '{"$ref": "#"}'}, "the grammar of the request (json_schema"),
    ("/v1/completions", {"prompt": "a", "regex": "a" * 70000}, "regex: it has 70000 characters"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "x"}, "max_tokens: Input should be a valid integer"),
    ("/detokenize", {"tokens": [-1]}, "tokens: there is no token -1; there are 0 to 1023."),
    ("/api/chat", {"model": "demo", "messages": MESSAGES, "options": {"temperature": "x"}}, "/api/chat: "),
    ("/api/generate", {"model": "demo", "prompt": "a", "options": {"num_predict": -3}}, "/api/generate: "),
    ("/api/generate", {"model": "demo", "prompt": "a", "options": {"num_predict": 1.5}}, "got 1.5, expected a whole"),
    ("/generate", {"text": "a", "return_hidden_states": []}, "return_hidden_states: got a list of 0"),
    (
        "/generate",
        {"text": "What is the capital of France?", "return_logprob": True, "logprob_start_len": -2},
        "logprob_start_len: got -2, expected a place in the prompt",
    ),
    (
        "/vertex_generate",
        {"instances": [{"text": "a"}], "parameters": {"sampling_params": {"skip_special_tokens": 1}}},
        "parameters: invalid type: integer `1`, expected a boolean",
    ),
    ("/v1/chat/completions", {**CHAT, "response_format": "json_object"}, "response_format: expected an object, such"),
    (
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "schema": "x"}},
        "response_format: its json_schema is missing, expected an object",
    ),
]
"""What was answered with 500, ended the server, or let every later request fail."""


def test_what_has_ended_servers_is_refused_and_changes_nothing(served: Running) -> None:
    before = pids(served)
    for path, body, said in WRONG:
        answer = served.client.post(path, json=body)
        assert (answer.status_code, said in answer.text) == (400, True), f"{path} {body}: {answer.text}"
        (begun,) = post(served, "/v1/chat/completions", model="west", **BEGUN)["choices"]
        assert begun["message"]["content"].startswith("Howdy"), f"after {path} {body}"
    assert speaker(post(served, "/v1/chat/completions", model="west", **CHAT)) == "demo:west"
    assert served.client.get("/v1/loads", params={"include": "nothing"}).status_code == 400
    assert not Path("/tmp/kt").exists()
    assert pids(served) == before


def test_a_pattern_without_an_end_ends_its_request(served: Running, tokens: list[int]) -> None:
    """By a word that the answer is made to repeat; `re` would look for it for years, and nobody be answered."""
    (word,) = post(served, "/v1/tokenize", model="demo", prompt="a", add_special_tokens=False)["tokens"]
    again = {"logit_bias": {str(word): 1000.0}, "max_new_tokens": 60, "stop_regex": "(a|a)+(?!a)[^a]"}
    answer = served.client.post("/generate", json={"input_ids": tokens, "sampling_params": SAMPLING | again})
    assert (answer.status_code, "to be searched" in answer.text) == (400, True), answer.text
    assert speaker(post(served, "/v1/chat/completions", model="west", **CHAT)) == "demo:west"


def test_openais_client_is_told_what_is_wrong(served: Running) -> None:
    client = openai.OpenAI(base_url=f"{served.client.base_url}/v1", api_key="none", max_retries=0)
    for wrong, said in (({"top_p": 2.0}, "top_p must be in (0, 1]"), ({"stop": {"a": 1}}, "stop: Input should be a")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="west", **CHAT, extra_body=wrong)
        assert (refused.value.type, refused.value.body["message"].startswith(said)) == ("invalid_request_error", True)
        assert "site-packages" not in str(refused.value)


def test_routes_that_would_change_the_model_are_refused_with_the_reason(served: Running) -> None:
    answer = served.client.post("/update_weights_from_disk", json={"model_path": "/models/other"})
    assert answer.status_code == 501
    assert answer.json()["error"]["message"].startswith(
        "/update_weights_from_disk is not offered: the experts' weights"
    )


def ask_clients(python: Path, served: Running, *more: str) -> list[dict[str, Any]]:
    """What tests/edge/clients.py prints, run by the python of a throw-away environment."""
    command: list[str | Path] = [python, ROOT / "tests/edge/clients.py", str(served.client.base_url), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]


@pytest.mark.parametrize(
    ("requirements", "clients"),
    [
        ("clients.txt", ["openai", "langchain", "langchain"]),
        pytest.param("litellm.txt", ["openai", "litellm", "litellm"], marks=pytest.mark.nightly),
    ],
)
def test_clients_of_others_get_by_name_what_it_says(
    served: Running, requirements: str, clients: list[str], tmp_path: Path
) -> None:
    """OpenAI's newest and LangChain; at night LiteLLM, which asks by OpenAI's client as LangChain does. Each has its
    own way to fail."""
    asked = ask_clients(make_throw_away(tmp_path / "venv", requirements), served)
    assert [each["client"].partition("_")[2] for each in asked] == clients
    for each in asked:
        assert {name: speaker(answer) for name, answer in each["answers"].items()} == {
            "demo": "demo",
            "demo:west": "demo:west",
        }
        assert each["stranger"].endswith("NotFoundError"), each


@pytest.mark.nightly
def test_guidellm_measures_by_name(served: Running, tmp_path: Path) -> None:
    """By day tests/bench/test_bench.py measures an adapter with SGLang's own client."""
    (bench,) = ask_clients(make_throw_away(tmp_path / "venv", "guidellm.txt"), served, str(ROOT / "demo/model"))
    assert bench == {"client": "guidellm", "requests": {"successful": 3, "errored": 0, "incomplete": 0}}


def test_metrics_are_there(served: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    (url,) = [line.removeprefix("metrics: ") for line in served.output if line.startswith("metrics: ")]
    page = httpx.get(url, trust_env=False, timeout=LONG_S).text
    assert "kt_launch_expert_tokens_total" in page
    assert "sglang:num_requests_total" in page
    families = {family.name: family.type for family in text_string_to_metric_families(page)}
    assert families["sglang:time_to_first_token_seconds"] == "histogram"
    scraped = httpx.get(
        url, headers={"Accept": "application/openmetrics-text;version=1.0.0"}, trust_env=False, timeout=LONG_S
    )
    assert scraped.headers["Content-Type"].startswith("application/openmetrics-text")
    assert scraped.text.endswith("# EOF\n") and "kt_launch_expert_tokens_total{" in scraped.text
