"""Tools of a chat: how calls are read out of the model's text, and which tools no model would see.

Trigger: `tools` in a request. Without `--tool-call-parser` SGLang returns a model's calls as text, and it accepts tools
for a chat template that has no place for them. Safe because SGLang itself finds the parser, from the chat template, and
only tells it in its log; only requests with tools are affected. Remove when it uses what it found.
"""

from __future__ import annotations

from typing import Any

PARSER = "--tool-call-parser"
JSON_PARSER = "qwen"
"""SGLang's name of the parser for `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""


def after_chat_init(result: None, serving: Any, *others: Any, **more: Any) -> None:
    """AFTER hook of `OpenAIServingChat.__init__`: the parser that was typed, else the one that SGLang found, else that
    of calls as JSON, which SGLang knows Qwen's templates of only if they have a switch for thinking."""
    if serving.tool_call_parser is None:
        found = serving.template_manager.suggested_tool_call_parser
        serving.tool_call_parser = found or (JSON_PARSER if _calls_as_json(template_of(serving) or "") else None)


def require_usable_tools(serving: Any, request: Any) -> None:
    """Raise ValueError for tools that the model would not see, or whose calls nobody would recognize."""
    choice = getattr(request, "tool_choice", None)
    if not getattr(request, "tools", None) or choice == "none":
        return
    if not shows_tools(serving):
        raise ValueError("tools: the chat template of this model has no place for them, so it would not see them.")
    if serving.tool_call_parser is None and choice in (None, "auto"):
        problem = "tools: it is not known how this model writes calls, so they would come as text"
        raise ValueError(f"{problem}; start the server with server.extra_args=[{PARSER},<name>].")


def shows_tools(serving: Any) -> bool:
    """Whether the chat template mentions tools; one that cannot be read is believed to."""
    template, own = template_of(serving), serving.template_manager.chat_template_name
    return own is not None or template is None or "tools" in template


def template_of(serving: Any) -> str | None:
    """The chat template, if it is a single one."""
    found = getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None


def _calls_as_json(template: str) -> bool:
    wanted, others = ("<tool_call>", "arguments"), ("<function=", "<arg_key>", "<parameter=")
    return all(word in template for word in wanted) and not any(word in template for word in others)
