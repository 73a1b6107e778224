"""What a request may ask for in vain: fields of OpenAI's and Ollama's that SGLang passes over, so that the answer would
be another one than was asked for, in silence. They are refused. Pure; what needs the model's chat template is in
tools.py.

Safe because nobody can want an answer without what he asked for; values that ask for nothing are let through. A row can
go when SGLang obeys or refuses its field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kt_sglang.edge.requests import Refused

Body = Mapping[str, Any]


class Unheard(NamedTuple):
    """A field, whether a body asks for something by it, and what to tell the client."""

    field: str
    asks: Callable[[Body], bool]
    why: str


def _given(field: str) -> Callable[[Body], bool]:
    return lambda body: body.get(field) not in (None, "", [], False)


def _wants_functions(body: Body) -> bool:
    return _given("functions")(body) or body.get("function_call") not in (None, "", "none", "auto")


def _wants_audio(body: Body) -> bool:
    kinds = body.get("modalities")
    return _given("audio")(body) or (isinstance(kinds, list) and "audio" in kinds)


def _wants_more_than_it_gets(body: Body) -> bool:
    best, answers = body.get("best_of"), body.get("n") or 1
    return isinstance(best, int) and isinstance(answers, int) and best > answers


def _has_images(body: Body) -> bool:
    messages = body.get("messages")
    spoken = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    return any(_given("images")(each) for each in [body, *spoken])


def _option(name: str, *neutral: float) -> Unheard:
    """One of Ollama's options that SGLang has nothing for. neutral: values by which nothing is asked."""

    def asks(body: Body) -> bool:
        options = body.get("options")
        return isinstance(options, dict) and options.get(name) not in (None, *neutral)

    return Unheard(f"options.{name}", asks, "SGLang does not sample so")


TEXT = "the model that is served reads and writes text"
_THINK = Unheard("think", _given("think"), "this route does not pass it on; /v1/chat/completions takes "
                 'chat_template_kwargs: {"enable_thinking": ...}')  # fmt: skip
_IMAGES = Unheard("images", _has_images, TEXT)
_OPTIONS = (_option("mirostat", 0), _option("typical_p", 0, 1), _option("tfs_z", 1))
_SUFFIX = Unheard("suffix", _given("suffix"), "text is only continued, not filled in before a suffix")
_LOGPROBS = tuple(
    Unheard(name, _given(name), "this route has none; /v1/chat/completions does")
    for name in ("logprobs", "top_logprobs")
)
CHAT = (
    Unheard("functions", _wants_functions, "OpenAI replaced it; send tools and tool_choice"),
    Unheard("audio", _wants_audio, TEXT),
    Unheard(
        "web_search_options", lambda body: body.get("web_search_options") is not None, "this server searches nothing"
    ),
    Unheard(
        "top_logprobs", lambda body: _given("top_logprobs")(body) and not body.get("logprobs"), "set logprobs: true"
    ),
    Unheard("max_completion_tokens", lambda body: body.get("max_completion_tokens") == 0, "expected at least 1"),
    Unheard("max_tokens", lambda body: body.get("max_tokens") == 0, "expected at least 1"),
)
ROUTES: Mapping[str, tuple[Unheard, ...]] = {
    "generate_request": tuple(Unheard(name, _given(name), TEXT) for name in ("image_data", "audio_data", "video_data")),
    "openai_v1_chat_completions": CHAT,
    "sagemaker_chat_completions": CHAT,
    "openai_v1_completions": (
        _SUFFIX,
        Unheard("best_of", _wants_more_than_it_gets, "all answers that are computed are returned; set n, and choose"),
    ),
    "v1_responses_request": (
        Unheard("conversation", _given("conversation"), "this server keeps none; send in `input` what was said before"),
        Unheard("prompt", _given("prompt"), "this server keeps no templates; send `instructions` and `input`"),
    ),
    "anthropic_v1_messages": (
        Unheard("mcp_servers", _given("mcp_servers"), "this server asks no others"),
        Unheard("container", _given("container"), "this server runs nothing"),
    ),
    "ollama_chat": (
        *_OPTIONS,
        *_LOGPROBS,
        _THINK,
        _IMAGES,
        Unheard("tools", _given("tools"), "this route does not pass them on; /v1/chat/completions does"),
    ),
    "ollama_generate": (
        *_OPTIONS,
        *_LOGPROBS,
        _THINK,
        _IMAGES,
        _SUFFIX,
        Unheard("template", _given("template"), "the model's own chat template is used; with raw: true, none"),
        Unheard("system", lambda body: bool(body.get("raw") and body.get("system")), "a raw prompt is taken as it is"),
        Unheard("context", _given("context"), "send what was said before in the prompt, or to /api/chat"),
    ),
}
"""SGLang's endpoint function → its rows."""


def require_heard(path: str, body: Any, rows: tuple[Unheard, ...]) -> None:
    """Raises Refused for the first field that would have no effect."""
    for row in rows if isinstance(body, dict) else ():
        if row.asks(body):
            raise Refused(400, row.field, f"{row.field} of {path} would have no effect: {row.why}.", "not_offered")
