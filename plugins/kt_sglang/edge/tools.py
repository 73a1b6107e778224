"""Tools of a chat: how calls are read out of the model's text, and which tools no model would see.

Trigger: `tools` in a request. Without `--tool-call-parser` SGLang returns a model's calls as text, and it accepts tools
for a chat template that has no place for them. Safe because SGLang itself finds the parser, from the chat template, and
only tells it in its log; only requests with tools are affected. Remove when it uses what it found.
"""

from __future__ import annotations

from typing import Any

from kt_sglang.edge.chat_template import NAMED, template_with_tools

PARSER = "--tool-call-parser"
JSON_PARSER = "qwen"
"""SGLang's name of the parser for `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""


def after_chat_init(result: None, serving: Any, *others: Any, **more: Any) -> None:
    """AFTER hook of `OpenAIServingChat.__init__`: the parser that was typed, else the one that SGLang found, else that
    of calls as JSON, which SGLang knows Qwen's templates of only if they have a switch for thinking."""
    if serving.tool_call_parser is None:
        template = template_with_tools(serving) or ""
        found = serving.template_manager.suggested_tool_call_parser or _found_in(template, serving)
        serving.tool_call_parser = found or (JSON_PARSER if _calls_as_json(template) else None)


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
    template, own = template_with_tools(serving), serving.template_manager.chat_template_name
    return own is not None or template is None or "tools" in template


def _found_in(template: str, serving: Any) -> str | None:
    """SGLang's name of the parser of a template's calls. SGLang itself looks only into the template for chats without
    tools, if there are two."""
    if not hasattr(serving.template_manager, NAMED):
        return None
    from sglang.srt.parser.template_manager import TemplateManager

    looking = TemplateManager()
    looking._run_template_detection(template, serving.tokenizer_manager.tokenizer)
    found: str | None = looking.suggested_tool_call_parser
    return found


def _calls_as_json(template: str) -> bool:
    wanted, others = ("<tool_call>", "arguments"), ("<function=", "<arg_key>", "<parameter=")
    return all(word in template for word in wanted) and not any(word in template for word in others)
