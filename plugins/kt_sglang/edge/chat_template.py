"""Which chat template the chat routes use: the tokenizer's, or the one that was typed (`--chat-template`); of several
named ones, those that transformers would choose. And what goes into it: messages and tools as they were sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kt_model.contract import NO_TEMPLATE

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""transformers' names of the templates for chats without tools and with them."""
NAMED = "kt_named_templates"
"""Attribute of SGLang's template manager: name → template, if the tokenizer has several."""
GUESSED, TYPED = "dsv32", "deepseekv32"
"""SGLang's name of DeepSeek-V3.2's encoding of chats, and the parser of calls by which it is typed."""
WITHOUT = (
    f"messages: this model has {NO_TEMPLATE}; send a prompt to /v1/completions, or start the server with "
    "server.extra_args=[--chat-template,/path/to/file.jinja]."
)
ASSISTANT, SYSTEM, DEVELOPER = "assistant", "system", "developer"
TELLS_NONE = re.compile(r"\bcontent['\"]?\]?\s+is\s+(?:not\s+)?none\b", re.IGNORECASE)
"""A template in which a message without content is something else than one with an empty text: DeepSeek-V3's writes the
calls of tools only then."""


def around_guess_chat_template(original: Callable[..., Any], manager: Any, model_path: str) -> None:
    """AROUND hook of `TemplateManager.guess_chat_template_from_model_path`: guesses nothing.

    SGLang looks for names of multimodal models in the whole path, and their templates go before the tokenizer's:
    `/home/janus/models/x`, `/data/whisper/x` and `/mnt/check-points/x` got those of Janus, Whisper and POINTS, in
    silence. Safe because it has templates only for multimodal families, which kt_model.families has none of. Remove
    once SGLang looks at the model instead of its path.
    """


def around_resolve_encoding(original: Callable[..., Any], *, tool_call_parser: str | None = None, **more: Any) -> Any:
    """AROUND hook of `chat_encoding.resolve_chat_encoding_spec`: a model without a chat template has none.

    SGLang words chats of the DeepSeek-V3 family as DeepSeek-V3.2's if there is no template, in silence: also those of
    a base model, and of others of that architecture. Safe because an encoding that was typed, as V3.2's parser of
    calls, is kept. Remove once SGLang looks for V3.2 itself.
    """
    found = original(tool_call_parser=tool_call_parser, **more)
    return None if found == GUESSED and tool_call_parser != TYPED else found


def around_select_named_template(
    original: Callable[..., Any], manager: Any, templates: Mapping[str, str], *others: Any
) -> str:
    """AROUND hook of `TemplateManager._select_named_template`, which takes the one that happens to stand first.

    Safe because a name that was typed (`--hf-chat-template-name`) goes first, and the plan refuses templates of which
    none is the default. Remove once SGLang chooses as transformers does.
    """
    from sglang.srt.runtime_context import get_serving

    if get_serving().hf_chat_template_name or DEFAULT not in templates:
        return str(original(manager, templates, *others))
    setattr(manager, NAMED, dict(templates))
    return templates[DEFAULT]


def around_render(
    original: Callable[..., Any], serving: Any, messages: Any, *, tools: Any, template_kwargs: Any, **more: Any
) -> Any:
    """AROUND hook of `OpenAIServingChat._render_and_encode_chat_template`: a chat with tools has the template for them.

    Messages and tools are as they were sent: SGLang writes fields into them, as null, and an empty text in place of no
    content. Safe because a call of tools has no other content in OpenAI's protocol; remove when it sends what it got.
    Raises ValueError, which SGLang answers with 400, if there is no template.
    """
    if not has_template(serving) and "chat_template" not in template_kwargs:
        raise ValueError(WITHOUT)
    named = getattr(serving.template_manager, NAMED, {})
    if tools and WITH_TOOLS in named:
        template_kwargs = {"chat_template": named[WITH_TOOLS], **template_kwargs}
    template = template_kwargs.get("chat_template") or template_with_tools(serving) or ""
    tells_none = TELLS_NONE.search(template) is not None
    messages = [with_calls_as_sent(message, tells_none) for message in messages]
    messages = messages if DEVELOPER in template else [as_system(message) for message in messages]
    tools = [as_sent(tool) for tool in tools] if tools else tools
    return original(serving, messages, tools=tools, template_kwargs=template_kwargs, **more)


def as_sent(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool, or a call of one, without what SGLang added to it and to its function; what is deeper in it is the
    client's."""
    kept = {name: value for name, value in tool.items() if value is not None}
    if isinstance(function := kept.get("function"), dict):
        kept["function"] = {name: value for name, value in function.items() if value is not None}
    return kept


def with_calls_as_sent(message: Mapping[str, Any], tells_none: bool) -> dict[str, Any]:
    """tells_none: whether an empty content is to be none beside calls."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    content = message.get("content")
    return {
        **message,
        "content": None if tells_none and content == "" else content,
        "tool_calls": [as_sent(call) for call in calls],
    }


def as_system(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's newer name of the system's role, which most templates do not know: they leave such a message out."""
    return {**message, "role": SYSTEM} if message.get("role") == DEVELOPER else message


def around_last_assistant(original: Callable[..., Any], serving: Any, messages: Any, request: Any) -> Any:
    """AROUND hook of `OpenAIServingChat._handle_last_assistant_message`: a chat whose last message is the assistant's
    is worded as such, as transformers does. SGLang makes it one of the user's, in silence. Safe because a template that
    wants another order says so, with a 400. Remove when SGLang leaves it."""
    if request.continue_final_message:
        return original(serving, messages, request)
    return messages, None


def has_template(serving: Any) -> bool:
    """Whether there is a template for chats. serving: SGLang's handler of chats."""
    manager = serving.template_manager
    typed = manager.chat_template_name or manager.python_chat_template
    return bool(typed or getattr(serving.tokenizer_manager.tokenizer, "chat_template", None))


def template_with_tools(serving: Any) -> str | None:
    """The tokenizer's template for a chat with tools."""
    named = getattr(serving.template_manager, NAMED, {})
    found = named.get(WITH_TOOLS) or getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None
