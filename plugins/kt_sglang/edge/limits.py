"""Limits on requests that would otherwise kill the scheduler or the HTTP process, or count as a server error.

Trigger: an empty prompt; token ids beyond the vocabulary (in `input_ids`, in a `prompt` of ids, in `stop_token_ids`, or
from a tokenizer that knows more tokens than the model); numbers beyond int32; beam search, whose rows SGLang's adapters
do not know; more logprobs than there are tokens, or from a place before the prompt; a list where there is one prompt;
embeddings of another width; a count with a fraction; so many answers (`n`) that their prompts' lists fill the memory
before one is computed; grammars that take minutes to compile; fields whose type raises a TypeError somewhere or fails
an assertion. SGLang accepts them unchecked. Safe because no such request could be answered. Remove when SGLang refuses
them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from jinja2 import TemplateError

from kt_sglang.edge.answers import ONE_ID
from kt_sglang.edge.defaults import ALL_TOKENS
from kt_sglang.edge.endings import note_end
from kt_sglang.edge.lengths import MOST_PROMPTS
from kt_sglang.edge.scoring import score_alone
from kt_sglang.edge.tools import require_usable_tools
from kt_sglang.sampling.grammars import without_words

REQUEST_LEVELS, REQUEST_FORMATS = range(4), ("text", "json")
"""Fields of SGLang's request log."""
MOST_ANSWERS = 128
"""Answers to one prompt, as in OpenAI's API."""
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
OF_SCHEMAS = frozenset({"json_schema", "structural_tag"})
"""Grammars whose words, such as the descriptions of dozens of tools, are nothing that an answer keeps to."""
LONGEST_GRAMMAR = 1 << 16
"""Characters of a grammar, without such words, which takes seconds to compile."""
ALWAYS_LOGPROBS, MOST_LOGPROBS = 20, 1 << 20
"""Logprobs of each token that OpenAI's API has at most, and of an answer beyond them: a million take ten seconds."""
NEW_TOKENS = 128
"""Tokens of an answer where SGLang's own route is asked for no number."""
COUNTS = frozenset({"max_new_tokens", "min_new_tokens", "top_k", "stream_interval", "sampling_seed"})
"""Whole numbers of sampling_params."""
LARGEST_COUNT = 2**31 - 1
"""SGLang has top_k and min_new_tokens of a batch in int32 tensors."""
LARGEST_BIAS = 1e30
"""Bound of a logit bias; divided by the smallest temperature, it is still a float32 number."""
ONE_OF_EACH = (
    *("rid", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "return_hidden_states"),
    *("return_sampling_mask", "sampling_logprobs_mode", "custom_logit_processor", "extra_key"),
)
"""Fields that are lists where there are several prompts."""
RECORDS = {"return_routed_experts": "enable_return_routed_experts", "return_indexer_topk": "enable_return_indexer_topk"}
"""Fields that ask for what SGLang has only if it was started with this option, and leaves out in silence otherwise."""
UNREADABLE = (
    *(TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, RecursionError),
    *(re.error, TemplateError),
)
"""What SGLang raises while it reads a request with fields of unexpected types."""
REFUSED = 400
"""Status of what is the fault of who sent it."""
log = logging.getLogger(__name__)


async def sound_answers(request: Any, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """`answers` to a request, which has been parsed by the first of them. Raises ValueError."""
    require_one_of_each(request)
    begun = False
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        try:
            async for part in answers:
                if not begun:
                    require_begun(part)
                begun = True
                note_end(request, part)
                yield part
        except UNREADABLE as failure:
            if begun:
                raise
            raise unreadable(failure) from failure


def require_begun(part: Any) -> None:
    """Raise ValueError for a first part in which the scheduler refuses the request, as it does one whose grammar cannot
    be compiled: SGLang refuses it where the answer is whole, and has it in a stream with status 200."""
    meta = part.get("meta_info") if isinstance(part, dict) else None
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort" and reason.get("status_code") == REFUSED:
        raise ValueError(reason.get("message"))


def unreadable(failure: Exception) -> ValueError:
    """The error for a request that SGLang could not parse."""
    log.info("a request could not be read", exc_info=failure)
    return ValueError(f"a field of the request has a value that it cannot have ({type(failure).__name__}: {failure}).")


def require_one_of_each(request: Any) -> None:
    """Raise ValueError if a list is given for a single prompt, or its length is not the number of prompts."""
    count = count_prompts(request)
    for name in ONE_OF_EACH:
        value = getattr(request, name, None)
        if isinstance(value, list) and len(value) != count:
            expected = f"a list of {count}, one for each prompt" if count is not None else "one value for one prompt"
            raise ValueError(f"{name}: got a list of {len(value)}, expected {expected}.")
    asked = getattr(request, "sampling_params", None)
    if isinstance(asked, list) and not all(isinstance(each, dict) for each in asked):
        raise ValueError("sampling_params: expected an object for each prompt.")


def count_prompts(request: Any) -> int | None:
    """The number of prompts; None for a single one, which gets a single answer."""
    text, ids, embeds = (getattr(request, name, None) for name in ("text", "input_ids", "input_embeds"))
    if text is not None:
        rows: Any = text if isinstance(text, list) else None
    elif ids is not None:
        rows = ids if ids and isinstance(ids[0], list) else None
    else:
        first = embeds[0] if embeds else None
        rows = embeds if isinstance(first, list) and first and isinstance(first[0], list) else None
    asked = getattr(request, "sampling_params", None)
    asked = asked[0] if isinstance(asked, list) and asked else asked
    answers = asked.get("n") if isinstance(asked, dict) else 1
    return len(rows) if rows is not None else 1 if isinstance(answers, int) and answers > 1 else None


def around_convert(original: Callable[..., Any], serving: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `_convert_to_internal_request` for chats and completions; the parts of a stream get one id. Raises
    ValueError."""
    require_usable_tools(serving, more.get("request", next(iter(others), None)))
    try:
        made = original(serving, *others, **more)
    except UNREADABLE as failure:
        raise unreadable(failure) from failure
    setattr(made[0], ONE_ID, bool(getattr(made[0], "stream", False)))
    score_alone(*made)
    return made


async def around_detokenize(
    original: Callable[..., Any], serving: Any, adapted: Any, request: Any, *others: Any
) -> Any:
    """AROUND hook of `OpenAIServingDetokenize._handle_non_streaming_request`."""
    size = serving.tokenizer_manager.model_config.vocab_size
    tokens = request.tokens if isinstance(request.tokens, list) else []
    for token in (each for part in tokens for each in (part if isinstance(part, list) else [part])):
        if type(token) is not int or not 0 <= token < size:
            return serving.create_error_response(f"tokens: there is no token {token}; there are 0 to {size - 1}.")
    return await original(serving, adapted, request, *others)


def require_sampling(asked: Any, vocab_size: int) -> None:
    """asked: sampling_params of one prompt, whose counts become whole numbers; a top_k of 0 is none, as vLLM and
    Ollama have it. Raises ValueError."""
    if asked.get("beam_width") not in (None, 1):
        raise ValueError("beam_width: beam search is not offered; set n for several answers.")
    for name in COUNTS & asked.keys():
        asked[name] = _whole(name, asked[name])
    if asked.get("top_k") == 0:
        asked["top_k"] = ALL_TOKENS
    for name in ("top_k", "min_new_tokens"):
        if isinstance(number := asked.get(name), int) and number > LARGEST_COUNT:
            raise ValueError(f"{name}: got {number}, expected at most {LARGEST_COUNT}.")
    ends = asked.get("stop_token_ids")
    for token in ends if isinstance(ends, (list, set, tuple)) else ():
        if isinstance(token, int) and not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_token_ids: there is no token {token}; the model's tokens are 0 to {vocab_size - 1}."
            )
    for name in GRAMMARS:
        if isinstance(grammar := asked.get(name), str) and len(grammar) > LONGEST_GRAMMAR:
            asked[name] = grammar = without_words(grammar) if name in OF_SCHEMAS else grammar
            if len(grammar) > LONGEST_GRAMMAR:
                raise ValueError(f"{name}: it has {len(grammar)} characters, expected at most {LONGEST_GRAMMAR}.")
    if asked.get("stop") == "" or (isinstance(asked.get("stop"), list) and "" in asked["stop"]):
        raise ValueError("stop: an empty text would end every answer at once; leave it out.")
    bias = asked.get("logit_bias")
    for token, value in bias.items() if isinstance(bias, dict) else ():
        if not str(token).isdecimal():
            raise ValueError(f"logit_bias: got {token!r:.40}, expected the id of a token as a key.")
        if not (isinstance(value, (int, float)) and abs(value) <= LARGEST_BIAS):
            raise ValueError(f"logit_bias: got {value} for token {token}, expected a number up to {LARGEST_BIAS:g}.")


def _whole(name: str, number: Any) -> Any:
    """A count without its `.0`: SGLang cuts lists at it. Raises ValueError for other fractions."""
    if not isinstance(number, float):
        return number
    if not number.is_integer():
        raise ValueError(f"{name}: got {number}, expected a whole number.")
    return int(number)


def require_recorded(request: Any) -> None:
    """Raise ValueError if a request asks for what this server does not record."""
    for name, option in RECORDS.items():
        if not getattr(request, name, False):
            continue
        from sglang.srt.runtime_context import get_exec

        if not getattr(get_exec().features, option):
            flag = option.replace("_", "-")
            raise ValueError(f"{name}: this server does not record them; SGLang does with --{flag}, on a GPU.")


def require_embeds(rows: Any, width: int, context_length: int) -> None:
    """rows: input_embeds of one prompt. Raises ValueError."""
    if not 0 < len(rows) < context_length:
        raise ValueError(f"input_embeds: got {len(rows)} rows, expected 1 to {context_length - 1}, the context.")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            got = len(row) if isinstance(row, list) else "no list"
            raise ValueError(f"input_embeds: row {number} has {got}, expected {width} numbers, the hidden size.")


def around_handle_parallel_sampling(original: Callable[..., Any], request: Any) -> Any:
    """AROUND hook of `GenerateReqInput._handle_parallel_sampling`. Raises ValueError, which SGLang answers with 400."""
    given = request.sampling_params
    for one in given if isinstance(given, list) else [given]:
        count = one.get("n", 1) if isinstance(one, dict) else 1
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_ANSWERS):
            raise ValueError(f"n: got {str(count)[:20]}, expected 1 to {MOST_ANSWERS} answers to a prompt.")
        if (count or 1) * (prompts := count_prompts(request) or 1) > MOST_PROMPTS:
            raise ValueError(f"n: got {count} for {prompts} prompts, expected at most {MOST_PROMPTS} answers in all.")
    return original(request)


def around_configure_logging(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """AROUND hook of `TokenizerManager.configure_logging`: SGLang stores an invalid value for its request log, on which
    every later request fails. Raises ValueError."""
    level, form, name = request.log_requests_level, request.log_requests_format, request.log_level
    if level is not None and level not in REQUEST_LEVELS:
        raise ValueError(f"log_requests_level: got {level}, expected 0 to {REQUEST_LEVELS[-1]}.")
    if form is not None and form not in REQUEST_FORMATS:
        raise ValueError(f"log_requests_format: got {form!r}, expected {' or '.join(REQUEST_FORMATS)}.")
    if name is not None and name.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"log_level: there is no level {name!r}; expected debug, info, warning, error or critical.")
    return original(manager, request)


def around_validate_one_request(original: Callable[..., Any], manager: Any, request: Any, input_ids: Any) -> Any:
    """AROUND hook of `TokenizerManager._validate_one_request`. Raises ValueError, which SGLang answers with 400."""
    size = manager.model_config.vocab_size
    if input_ids is not None and len(input_ids) == 0 and getattr(request, "input_embeds", None) is None:
        raise ValueError("the prompt is empty: it has no token.")
    if input_ids and not manager.model_config.is_multimodal:
        wrong = next((token for token in (min(input_ids), max(input_ids)) if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(f"input_ids: there is no token {wrong}; the model's tokens are 0 to {size - 1}.")
    if isinstance(asked := getattr(request, "sampling_params", None), dict):
        require_sampling(asked, size)
    require_recorded(request)
    if (embeds := getattr(request, "input_embeds", None)) is not None:
        require_embeds(embeds, manager.model_config.hidden_size, manager.model_config.context_len)
    start = getattr(request, "logprob_start_len", None)
    if isinstance(start, int) and start < -1:
        raise ValueError(f"logprob_start_len: got {start}, expected a place in the prompt from 0 on, or -1 for none.")
    wanted = getattr(request, "top_logprobs_num", None) or 0
    if not 0 <= wanted <= size:
        raise ValueError(f"top_logprobs: got {wanted}, but the model has {size} tokens.")
    if wanted > ALWAYS_LOGPROBS and wanted * (tokens := _told_tokens(manager, request, input_ids)) > MOST_LOGPROBS:
        problem = f"top_logprobs: got {wanted} for up to {tokens} tokens, expected at most {MOST_LOGPROBS} in an answer"
        raise ValueError(f"{problem}; ask for fewer, or set a smaller max_tokens.")
    return original(manager, request, input_ids)


def _told_tokens(manager: Any, request: Any, input_ids: Any) -> int:
    """Tokens whose logprobs a request asks for at most, of its prompt and of its answer."""
    asked, length = getattr(request, "sampling_params", None), len(input_ids or ())
    new = asked.get("max_new_tokens", NEW_TOKENS) if isinstance(asked, dict) else 0
    start = getattr(request, "logprob_start_len", None)
    told = length - start if isinstance(start, int) and 0 <= start < length else 0
    left: int = max(manager.model_config.context_len - length, 0)
    return told + (min(new, left) if isinstance(new, int) else left)
