"""Fields that mean something on another route, or to another server, and nothing on the route that they were sent to:
`max_completion_tokens` of /v1/completions, `temperature` beside the sampling_params of /generate, vLLM's `guided_json`.
SGLang passes them over, so that an answer would be longer, freer or another one than was asked for. They are refused
with the name that this route has for them. Pure.

Safe because OpenAI and Anthropic refuse all fields that they do not know, and only those that change an answer are in
these tables. A row can go when SGLang obeys or refuses its field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kt_sglang.edge.unheard import Body, Unheard, given

COUNTS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens")
"""What routes call the number of tokens of an answer."""
FORMS = (
    *("response_format", "json_schema", "structural_tag", "output_format"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
)
"""What routes, and vLLM, call the form of an answer."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "stop_regex", "ignore_eos", "min_new_tokens", "logit_bias", "sampling_seed"),
    *("seed", "regex", "ebnf", *FORMS[1:3], *COUNTS),
)
"""sampling_params of /generate, and what other routes call them."""
ZERO_ASKS = frozenset({"temperature", "seed", "sampling_seed", "prompt_logprobs"})
"""Fields by which 0 asks for something, too."""
IN_PARAMETERS = "send it in sampling_params, by its name there"
CHAT_DOES = "this route does not take it; /v1/chat/completions does"


def _rows(names: tuple[str, ...], why: str) -> tuple[Unheard, ...]:
    return tuple(Unheard(name, _also_zero(name) if name in ZERO_ASKS else given(name), why) for name in names)


def _also_zero(field: str) -> Callable[[Body], bool]:
    return lambda body: body.get(field) is not None and body[field] is not False


def _counts(*own: str) -> tuple[Unheard, ...]:
    """Names of the number of tokens that a route does not know, if they have another number than the `own` ones, of
    which the first is to be sent."""

    def differs(name: str) -> Callable[[Body], bool]:
        return lambda body: given(name)(body) and all(body.get(each) != body[name] for each in own)

    return tuple(Unheard(name, differs(name), f"send {own[0]}") for name in COUNTS if name not in own)


def _except(names: tuple[str, ...], *known: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def _wants_several(body: Body) -> bool:
    return body.get("n") not in (None, 0, 1)


def _adds_no_prompt(body: Body) -> bool:
    """vLLM's clients send it beside continue_final_message, which it goes without saying with."""
    return body.get("add_generation_prompt") is False and not body.get("continue_final_message")


ONE = Unheard("n", _wants_several, "an answer of this route is a single one; ask again, or /v1/chat/completions")
OF_VLLM = (
    *_rows(("use_beam_search",), "beam search is not offered; set n for several answers"),
    *_rows(("bad_words",), "send logit_bias"),
    *_rows(("allowed_token_ids",), "send regex or logit_bias"),
    *_rows(("include_stop_str_in_output",), "send no_stop_trim"),
    *_rows(("truncate_prompt_tokens",), "prompts are taken whole; shorten it"),
)
CHAT = (
    *_counts("max_completion_tokens", "max_tokens"),
    *_rows(_except(FORMS, "response_format"), "send response_format"),
    *_rows(("prompt", "text", "input"), "send messages"),
    *_rows(("stop_sequences",), "send stop"),
    *_rows(("prompt_logprobs", "echo"), "/v1/completions takes echo: true with logprobs"),
    Unheard("add_generation_prompt", _adds_no_prompt, "an answer is the assistant's"),
    *OF_VLLM,
)
ROUTES: Mapping[str, tuple[Unheard, ...]] = {
    "openai_v1_chat_completions": CHAT,
    "sagemaker_chat_completions": CHAT,
    "openai_v1_completions": (
        *_counts("max_tokens"),
        *_rows(_except(FORMS, "response_format", "json_schema"), "send response_format"),
        *_rows(("messages",), "send prompt, or ask /v1/chat/completions"),
        *_rows(("text", "input", "input_ids"), "send prompt"),
        *_rows(("stop_sequences",), "send stop"),
        *_rows(("top_logprobs",), "send the number as logprobs"),
        *_rows(("prompt_logprobs",), "send echo: true and the number as logprobs"),
        *OF_VLLM,
    ),
    "v1_responses_request": (
        *_counts("max_output_tokens"),
        *_rows((*FORMS, "regex", "ebnf"), "send text with a `format`"),
        *_rows(("messages",), "send input"),
        *_rows(("logprobs",), "add message.output_text.logprobs to `include`"),
        *_rows(("seed", "logit_bias", "min_tokens"), CHAT_DOES),
        ONE,
    ),
    "anthropic_v1_messages": (
        *_counts("max_tokens"),
        *_rows((*FORMS, "regex", "ebnf"), "send output_config with a `format`"),
        *_rows(("stop",), "send stop_sequences"),
        *_rows(("prompt", "input"), "send messages"),
        *_rows(("seed", "logprobs", "top_logprobs", "frequency_penalty", "presence_penalty"), CHAT_DOES),
        ONE,
    ),
    "generate_request": (
        *_rows(("prompt", "messages", "input"), "send text or input_ids"),
        *_rows(SAMPLING, IN_PARAMETERS),
        Unheard("n", _wants_several, IN_PARAMETERS),
        *_rows(("best_of", "logprobs", "top_logprobs", "echo"), "/v1/completions takes it"),
    ),
}
"""SGLang's endpoint function → its rows."""
