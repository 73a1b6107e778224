"""Which tools of a chat are accepted, how their calls are recognized, and what comes of a call that is none: by
SGLang's own detection, without a server. What clients get is shown by test_served.py and test_real_files.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kt_sglang.edge.chat_template import around_render, around_resolve_encoding, around_select_named_template
from kt_sglang.edge.cut_calls import (
    around_finish_json,
    around_parse_chunk,
    around_parse_end,
    around_parse_json,
    around_parse_whole,
    around_unstreamed,
)
from kt_sglang.edge.one_call import ONE_CALL, wants_one
from kt_sglang.edge.tools import JSON_PARSER, after_chat_init, require_usable_tools
from kt_sglang.without_gpu import torchvision_shim

TOOLS = [{"type": "function", "function": {"name": "get"}}]
JSON = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> Answer within <tool_call>"
    '</tool_call>: {"name": <function-name>, "arguments": <args-json-object>}{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
)
CODER = "{% for tool in tools %}{{ tool.name }}{% endfor %}<tool_call><function=name><parameter=arguments>"
STRANGE = "{% for tool in tools %}{{ tool.name }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def serving(template: Any, typed: str | None = None, own: str | None = None) -> Any:
    """SGLang's handler of chats, as far as it matters, with what SGLang finds in the chat template."""
    torchvision_shim.install_if_needed()
    from sglang.srt.parser.template_manager import TemplateManager

    templates = TemplateManager()
    templates._run_template_detection(template, None)
    templates._chat_template_name = own
    made = SimpleNamespace(tool_call_parser=typed, template_manager=templates)
    made.tokenizer_manager = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=template))
    after_chat_init(None, made)
    return made


def asking(choice: Any = "auto", tools: Any = TOOLS) -> Any:
    return SimpleNamespace(tools=tools, tool_choice=choice)


def test_the_parser_that_the_template_speaks_of_is_used_and_a_typed_one_before_it() -> None:
    assert (serving(JSON).tool_call_parser, serving(CODER).tool_call_parser) == ("qwen", "qwen3_coder")
    assert serving(JSON, typed="hermes").tool_call_parser == "hermes"
    assert serving(STRANGE).tool_call_parser is None
    for made in (serving(JSON), serving(STRANGE, typed="hermes"), serving(None, "hermes", own="llama-2")):
        require_usable_tools(made, asking())


def test_calls_as_json_are_read_by_the_parser_of_that_name() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    parser = FunctionCallParser([Tool.model_validate(tool) for tool in TOOLS], JSON_PARSER)
    text, (call,) = parser.parse_non_stream('Look: <tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>')
    assert (text.strip(), call.name, call.parameters) == ("Look:", "get", '{"a": 1}')


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function"}])
def test_tools_that_the_model_would_not_see_are_refused(choice: Any) -> None:
    with pytest.raises(ValueError, match="tools: the chat template of this model has no place for them"):
        require_usable_tools(serving(PLAIN, typed="hermes"), asking(choice))


def test_calls_that_nobody_would_recognize_are_refused_unless_their_form_is_given() -> None:
    with pytest.raises(ValueError, match=r"start the server with server.extra_args=\[--tool-call-parser,<name>\]"):
        require_usable_tools(serving(STRANGE), asking())
    require_usable_tools(serving(STRANGE), asking("required"))


def test_without_tools_nothing_is_asked() -> None:
    for request in (asking("none"), asking(tools=None), asking(tools=[]), SimpleNamespace(prompt="Hi")):
        require_usable_tools(serving(PLAIN), request)


CALL = 'Look: <tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
OWN = {"chat_template": PLAIN}
NAMED_AT = CALL.index('"get"') + len('"get"')


def parser_of(name: str) -> Any:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return FunctionCallParser([Tool.model_validate(tool) for tool in TOOLS], name)


def streamed(text: str, step: int) -> tuple[str, list[str]]:
    """The text and the names of calls that come out of a stream of so many characters at a time."""
    parser = parser_of(JSON_PARSER)
    kind = type(parser)
    parts = [
        around_parse_chunk(kind.parse_stream_chunk, parser, text[at : at + step]) for at in range(0, len(text), step)
    ]
    parts.append(around_parse_end(kind.parse_stream_end, parser))
    return "".join(part for part, _ in parts), [call.name for _, calls in parts for call in calls if call.name]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_stream_that_ends_before_a_call_is_known_is_text(step: int) -> None:
    for end in range(1, CALL.index("get") + 1):
        text, names = streamed(CALL[:end], step)
        assert (text, names) == (CALL[:end], [])


def test_a_stream_with_a_call_has_the_call_and_not_its_text() -> None:
    for end in (NAMED_AT + 2, len(CALL)):
        text, names = streamed(CALL[:end], 3)
        assert (text.strip(), names) == ("Look:", ["get"])
    assert streamed("2 < 3 <", 1) == ("2 < 3 <", [])


def test_what_is_missing_of_a_call_that_was_cut_short_is_not_made_up() -> None:
    """SGLang itself closes the braces, so that a client could take the call for a whole one."""
    parser = parser_of(JSON_PARSER)
    parser.parse_stream_chunk(CALL[:NAMED_AT])
    parser.parse_stream_chunk(CALL[NAMED_AT : CALL.index('"a"')])
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    own, asked = OpenAIServingChat._check_for_unstreamed_tool_args, SimpleNamespace(model="demo")
    told = [
        around_unstreamed(own, None, parser, {"meta_info": {"id": "1", "finish_reason": end}}, asked, 0, created=0)
        for end in ({"type": "length", "length": 9}, {"type": "stop", "matched": 1})
    ]
    assert told[0] is None and '"arguments":"{}"' in told[1]


@pytest.mark.parametrize("end", [len(CALL) - 1, NAMED_AT, CALL.index("{")])
def test_an_answer_whose_call_is_cut_short_is_text(end: int) -> None:
    parser = parser_of(JSON_PARSER)
    assert around_parse_whole(type(parser).parse_non_stream, parser, CALL[:end]) == (CALL[:end], [])


def test_an_answer_with_a_call_has_the_call_and_not_its_text() -> None:
    parser = parser_of(JSON_PARSER)
    text, (call,) = around_parse_whole(type(parser).parse_non_stream, parser, CALL)
    assert (text.strip(), call.name) == ("Look:", "get")


@pytest.mark.parametrize(("end", "names"), [(9, []), (60, ["get"])])
def test_a_list_of_calls_that_is_cut_short_is_text_until_a_name_is_known(end: int, names: list[str]) -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.json_array_parser import JsonArrayParser

    parser, tools = JsonArrayParser(), [Tool.model_validate(tool) for tool in TOOLS]
    calls = '[{"name": "get", "parameters": {"a": 1}}]'[:end]
    kind = JsonArrayParser
    found = [around_parse_json(kind.parse_streaming_increment, parser, letter, tools) for letter in calls]
    found.append(around_finish_json(kind.finish, parser, tools))
    text = "".join(part.normal_text or "" for part in found)
    assert text == ("" if names else calls)
    assert [call.name for part in found for call in part.calls if call.name] == names


@pytest.fixture
def one_call() -> Iterator[None]:
    """A request that asks for at most one call."""
    token = ONE_CALL.set(True)
    yield
    ONE_CALL.reset(token)


def called(texts: Iterable[str], name: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a stream and (name, arguments) of its calls, the end included. name: of a parser."""
    parser = parser_of(name)
    kind = type(parser)
    parts = [around_parse_chunk(kind.parse_stream_chunk, parser, text) for text in texts]
    parts.append(around_parse_end(kind.parse_stream_end, parser))
    calls: list[tuple[str, str]] = []
    for part in (call for _, some in parts for call in some):
        calls += [(part.name, "")] if part.name else []
        calls[-1] = (calls[-1][0], calls[-1][1] + part.parameters)
    return "".join(text or "" for text, _ in parts), calls


TWO = {
    "qwen": CALL + CALL.removeprefix("Look: ").replace("1}", "2}"),
    "hermes": CALL + CALL.removeprefix("Look: ").replace("1}", "2}"),
    "qwen3_coder": "Look: "
    + "".join(
        f"<tool_call>\n<function=get>\n<parameter=a>\n{number}\n</parameter>\n</function>\n</tool_call>\n"
        for number in (1, 2)
    ),
    "pythonic": "[get(a=1), get(a=2)]",
    "deepseekv3": "Look: <｜tool▁calls▁begin｜>"
    + "\n".join(
        f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{{"a": {number}}}\n```<｜tool▁call▁end｜>'
        for number in (1, 2)
    )
    + "<｜tool▁calls▁end｜>",
    "glm45": "".join(
        f"<tool_call>get\n<arg_key>a</arg_key>\n<arg_value>{number}</arg_value>\n</tool_call>" for number in (1, 2)
    ),
}
"""Parser → two calls as its models write them."""


@pytest.mark.parametrize("name", TWO)
def test_of_several_calls_the_first_alone_comes_if_one_was_asked_for(name: str, request: Any) -> None:
    tokens = re.findall(r"<[^>]*>|[^<]", TWO[name])
    text, calls = called(tokens, name)
    parser = parser_of(name)
    _, both = around_parse_whole(type(parser).parse_non_stream, parser, TWO[name])
    assert (len(both), len(calls)) == (2, 2)
    request.getfixturevalue("one_call")
    parser = parser_of(name)
    _, alone = around_parse_whole(type(parser).parse_non_stream, parser, TWO[name])
    assert [json.loads(call.parameters) for call in alone] == [json.loads(both[0].parameters)]
    assert called(tokens, name) == (text, calls[:1])


@pytest.mark.usefixtures("one_call")
def test_what_the_end_of_a_stream_lacks_of_a_later_call_is_not_sent() -> None:
    parser = parser_of(JSON_PARSER)
    kind = type(parser)
    text = TWO[JSON_PARSER][: TWO[JSON_PARSER].rindex('"a"')]
    for letter in text:
        around_parse_chunk(kind.parse_stream_chunk, parser, letter)
    end = {"meta_info": {"finish_reason": {"type": "stop"}}}
    assert around_unstreamed(lambda *_: pytest.fail("sent"), None, parser, end) is None


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"parallel_tool_calls": False}, True),
        ({"parallel_tool_calls": True}, False),
        ({"parallel_tool_calls": None}, False),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, True),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": False}}, False),
        ({"tool_choice": "auto"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_one_call_is_asked_for_by_openais_field_and_anthropics(body: dict[str, Any], wanted: bool) -> None:
    assert wants_one(body) is wanted


def named_templates(**templates: str) -> Any:
    """SGLang's handler of chats for a tokenizer with several templates."""
    torchvision_shim.install_if_needed()
    from sglang.srt.parser.template_manager import TemplateManager

    made = serving(PLAIN)
    around_select_named_template(TemplateManager._select_named_template, made.template_manager, templates, None)
    made.tool_call_parser = None
    after_chat_init(None, made)
    return made


def test_of_several_templates_that_for_tools_tells_how_calls_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_shim.install_if_needed()
    import sglang.srt.runtime_context as context

    monkeypatch.setattr(context, "get_serving", lambda: SimpleNamespace(hf_chat_template_name=None))
    made = named_templates(tool_use=CODER, default=PLAIN)
    assert made.tool_call_parser == "qwen3_coder"
    require_usable_tools(made, asking())
    with pytest.raises(ValueError, match="has no place for them"):
        require_usable_tools(named_templates(rag=CODER, default=PLAIN), asking())


@pytest.mark.parametrize(("template", "parser", "expected"), [
    (None, None, None), (None, "deepseekv3", None), (PLAIN, None, None), (None, "deepseekv32", "dsv32"),
])  # fmt: skip
def test_a_model_without_a_template_gets_none_of_another(template: Any, parser: Any, expected: Any) -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.openai.chat_encoding import resolve_chat_encoding_spec

    config = SimpleNamespace(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")
    tokenizer = SimpleNamespace(chat_template=template)
    asked = {"hf_config": config, "tokenizer": tokenizer, "tool_call_parser": parser}
    assert around_resolve_encoding(resolve_chat_encoding_spec, **asked) == expected


def test_a_chat_with_a_model_without_a_template_is_refused_with_what_to_do() -> None:
    made = serving(None)
    with pytest.raises(ValueError, match=r"server.extra_args=\[--chat-template,/path/to/file.jinja\]"):
        around_render(lambda *_, **__: pytest.fail("asked"), made, [], tools=None, template_kwargs={})
    told = around_render(lambda *_, **more: more["template_kwargs"], made, [], tools=None, template_kwargs=OWN)
    assert told == OWN


@pytest.mark.parametrize(("template", "role"), [(PLAIN, "system"), (PLAIN + "{# developer #}", "developer")])
def test_a_developer_is_the_system_to_a_template_that_does_not_know_it(template: str, role: str) -> None:
    sent = [{"role": "developer", "content": "Be short"}, {"role": "user", "content": "Hi"}]
    told = around_render(lambda _, messages, **more: messages, serving(template), sent, tools=None, template_kwargs={})
    assert [message["role"] for message in told] == [role, "user"]
