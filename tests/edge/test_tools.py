"""Which tools of a chat are accepted, and how their calls are recognized: by SGLang's own detection, without a server.
What clients of a model without a place for tools get is shown by test_served.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
