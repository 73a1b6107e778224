"""What a request may ask for in vain: fields that SGLang passes over, alone or beside another field, so that the answer
would be another one than was asked for, in silence. They are refused. Pure; what needs the model's chat template is in
tools.py, fields that belong to other routes are in elsewhere.py.

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


def given(field: str) -> Callable[[Body], bool]:
    """Whether a body has more in this field than what asks for nothing."""
    return lambda body: body.get(field) not in (None, "", [], {}, False)


def _wants_functions(body: Body) -> bool:
    return given("functions")(body) or body.get("function_call") not in (None, "", "none", "auto")


def _wants_audio(body: Body) -> bool:
    kinds = body.get("modalities")
    return given("audio")(body) or (isinstance(kinds, list) and "audio" in kinds)


def _wants_the_best(body: Body) -> bool:
    best, answers = body.get("best_of"), body.get("n") or 1
    return isinstance(best, int) and isinstance(answers, int) and best not in (0, answers)


def _has_two_bounds(body: Body) -> bool:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    return None not in (old, new) and old != new


def _continues_nothing(body: Body) -> bool:
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return body.get("continue_final_message") is True and isinstance(last, dict) and last.get("role") != "assistant"


def _has_logprobs_left_out(body: Body) -> bool:
    included = body.get("include")
    return given("top_logprobs")(body) and not (isinstance(included, list) and OUTPUT_LOGPROBS in included)


def _is_none_or_less(body: Body) -> bool:
    wanted = body.get("max_output_tokens")
    return isinstance(wanted, int) and wanted <= 0


def _without_logprobs(field: str) -> Callable[[Body], bool]:
    def asks(body: Body) -> bool:
        value = body.get(field)
        wanted = any(value) if isinstance(value, list) else value
        return bool(wanted) and not body.get("return_logprob")

    return asks


def _has_two_forms(body: Body) -> bool:
    form = body.get("response_format")
    return given("json_schema")(body) and isinstance(form, dict) and form.get("type") != "text"


def _in_two_ways(field: str, *others: str) -> Unheard:
    """A way to send a prompt, which SGLang passes over where one of the others is sent, too."""
    why = f"{' or '.join(others)} is sent, too; send only one of {', '.join(PROMPTS)}"
    return Unheard(field, lambda body: given(field)(body) and any(given(other)(body) for other in others), why)


def _in_row(row: Unheard) -> Unheard:
    """The same in any of the rows of /vertex_generate."""

    def asks(body: Body) -> bool:
        rows = body.get("instances")
        return isinstance(rows, list) and any(isinstance(each, dict) and row.asks(each) for each in rows)

    return Unheard(f"instances.{row.field}", asks, row.why)


def _has_images(body: Body) -> bool:
    messages = body.get("messages")
    spoken = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    return any(given("images")(each) for each in [body, *spoken])


def _option(name: str, *neutral: float) -> Unheard:
    """One of Ollama's options that SGLang has nothing for. neutral: values by which nothing is asked."""

    def asks(body: Body) -> bool:
        options = body.get("options")
        return isinstance(options, dict) and options.get(name) not in (None, *neutral)

    return Unheard(f"options.{name}", asks, "SGLang does not sample so")


TEXT = "the model that is served reads and writes text"
PROMPTS = ("text", "input_ids", "input_embeds")
"""How SGLang's own routes take a prompt."""
RETURN = "set return_logprob: true"
OUTPUT_LOGPROBS = "message.output_text.logprobs"
_BEST = Unheard("best_of", _wants_the_best, "all answers that are computed are returned; set n, and choose")
_THINK = Unheard("think", given("think"), "this route does not pass it on; /v1/chat/completions takes "
                 'chat_template_kwargs: {"enable_thinking": ...}')  # fmt: skip
_IMAGES = Unheard("images", _has_images, TEXT)
_OPTIONS = (_option("mirostat", 0), _option("typical_p", 0, 1), _option("tfs_z", 1))
_SUFFIX = Unheard("suffix", given("suffix"), "text is only continued, not filled in before a suffix")
_LOGPROBS = tuple(
    Unheard(name, given(name), "this route has none; /v1/chat/completions does")
    for name in ("logprobs", "top_logprobs")
)
CHAT = (
    Unheard("functions", _wants_functions, "OpenAI replaced it; send tools and tool_choice"),
    Unheard("audio", _wants_audio, TEXT),
    Unheard(
        "web_search_options", lambda body: body.get("web_search_options") is not None, "this server searches nothing"
    ),
    Unheard(
        "top_logprobs", lambda body: given("top_logprobs")(body) and not body.get("logprobs"), "set logprobs: true"
    ),
    Unheard("max_completion_tokens", lambda body: body.get("max_completion_tokens") == 0, "expected at least 1"),
    Unheard("max_tokens", lambda body: body.get("max_tokens") == 0, "expected at least 1"),
    Unheard("max_tokens", _has_two_bounds, "max_completion_tokens is another number; send only one of them"),
    Unheard("continue_final_message", _continues_nothing, "the last message is not the assistant's"),
    _BEST,
)
ROUTES: Mapping[str, tuple[Unheard, ...]] = {
    "generate_request": (
        *(Unheard(name, given(name), TEXT) for name in ("image_data", "audio_data", "video_data")),
        Unheard(
            "return_entropy", given("return_entropy"), "SGLang computes none; top_logprobs_num has the distribution"
        ),
        _in_two_ways("text", "input_ids"),
        _in_two_ways("input_embeds", "text", "input_ids"),
        *(Unheard(name, _without_logprobs(name), RETURN) for name in ("top_logprobs_num", "token_ids_logprob")),
    ),
    "vertex_generate": (
        _in_row(_in_two_ways("input_ids", "text")),
        _in_row(_in_two_ways("input_embeds", "text", "input_ids")),
        _in_row(Unheard("sampling_params", given("sampling_params"), "send them in parameters, for all")),
    ),
    "openai_v1_chat_completions": CHAT,
    "sagemaker_chat_completions": CHAT,
    "openai_v1_completions": (_SUFFIX, _BEST, Unheard("json_schema", _has_two_forms, "response_format is sent, too")),
    "v1_responses_request": (
        Unheard("conversation", given("conversation"), "this server keeps none; send in `input` what was said before"),
        Unheard("prompt", given("prompt"), "this server keeps no templates; send `instructions` and `input`"),
        Unheard("top_logprobs", _has_logprobs_left_out, f"add {OUTPUT_LOGPROBS} to `include`"),
        Unheard("max_output_tokens", _is_none_or_less, "expected at least 1"),
    ),
    "anthropic_v1_messages": (
        Unheard("mcp_servers", given("mcp_servers"), "this server asks no others"),
        Unheard("container", given("container"), "this server runs nothing"),
    ),
    "ollama_chat": (
        *_OPTIONS,
        *_LOGPROBS,
        _THINK,
        _IMAGES,
        Unheard("tools", given("tools"), "this route does not pass them on; /v1/chat/completions does"),
    ),
    "ollama_generate": (
        *_OPTIONS,
        *_LOGPROBS,
        _THINK,
        _IMAGES,
        _SUFFIX,
        Unheard("template", given("template"), "the model's own chat template is used; with raw: true, none"),
        Unheard("system", lambda body: bool(body.get("raw") and body.get("system")), "a raw prompt is taken as it is"),
        Unheard("context", given("context"), "send what was said before in the prompt, or to /api/chat"),
    ),
}
"""SGLang's endpoint function → its rows."""


def require_heard(path: str, body: Any, rows: tuple[Unheard, ...]) -> None:
    """Raises Refused for the first field that would have no effect."""
    for row in rows if isinstance(body, dict) else ():
        if row.asks(body):
            raise Refused(400, row.field, f"{row.field} of {path} would have no effect: {row.why}.", "not_offered")
