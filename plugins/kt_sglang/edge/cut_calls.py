"""Calls of tools that came to nothing, because max_tokens cut them short or they were no calls: the client gets what
the model wrote as text.

Trigger: an answer with `tools` in which the mark of a call stands, but no call could be read. SGLang leaves such text
out, in streams the beginning of a mark at the end of an answer too, so that an answer of `max_tokens` tokens may be
empty. Safe because answers with a call are passed on as they are. Remove when SGLang returns what it could not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kt_sglang.edge.one_call import first_of, first_streamed, is_beyond

HELD = "kt_held"
"""Attribute of SGLang's parsers: what a stream brought, and what of it has been passed on."""


class Held:
    """The text of one stream."""

    def __init__(self) -> None:
        self.came = self.passed_on = ""
        self.called = False

    def note(self, came: str, passed_on: str | None, calls: Any) -> None:
        self.came += came
        self.passed_on += passed_on or ""
        self.called = self.called or bool(calls)

    @property
    def rest(self) -> str:
        """What nobody has been given; nothing if there was a call, or if the parser has changed the text."""
        is_begun = self.came.startswith(self.passed_on)
        return self.came[len(self.passed_on) :] if is_begun and not self.called else ""


def held_by(parser: Any) -> Held:
    found = getattr(parser, HELD, None)
    if not isinstance(found, Held):
        found = Held()
        setattr(parser, HELD, found)
    return found


def around_parse_whole(original: Callable[..., Any], parser: Any, text: str, *others: Any, **more: Any) -> Any:
    """AROUND hook of `FunctionCallParser.parse_non_stream`."""
    left, calls = original(parser, text, *others, **more)
    return (left, first_of(calls)) if calls else (text, calls)


def around_parse_chunk(original: Callable[..., Any], parser: Any, text: str) -> Any:
    """AROUND hook of `FunctionCallParser.parse_stream_chunk`."""
    passed_on, calls = original(parser, text)
    held_by(parser).note(text, passed_on, calls)
    return passed_on, first_streamed(parser, calls)


def around_parse_end(original: Callable[..., Any], parser: Any) -> Any:
    """AROUND hook of `FunctionCallParser.parse_stream_end`."""
    passed_on, calls = original(parser)
    held = held_by(parser)
    held.note("", passed_on, calls)
    return (passed_on or "") + held.rest, first_streamed(parser, calls)


def around_parse_json(original: Callable[..., Any], parser: Any, text: str, *others: Any) -> Any:
    """AROUND hook of `JsonArrayParser.parse_streaming_increment`."""
    found = original(parser, text, *others)
    held_by(parser).note(text, found.normal_text, found.calls)
    found.calls = first_streamed(parser, found.calls)
    return found


def around_finish_json(original: Callable[..., Any], parser: Any, *others: Any) -> Any:
    """AROUND hook of `JsonArrayParser.finish`, which parses what is left."""
    found = original(parser, *others)
    found.normal_text = (found.normal_text or "") + held_by(parser).rest
    return found


def around_unstreamed(
    original: Callable[..., Any], serving: Any, parser: Any, content: Any, *others: Any, **more: Any
) -> Any:
    """AROUND hook of `OpenAIServingChat._check_for_unstreamed_tool_args`: of a call that max_tokens cut short, nothing
    is sent that the model did not write. SGLang closes what is open, so that `{` became the arguments `{}`."""
    reason = content["meta_info"].get("finish_reason")
    if is_beyond(parser) or (isinstance(reason, dict) and reason.get("type") == "length"):
        return None
    return original(serving, parser, content, *others, **more)
