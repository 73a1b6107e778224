"""Ollama's routes: prompts are worded as on /v1/chat/completions, answers name the model that was requested, say why
they end, are complete in streams, too, and keep to a requested format; an aborted stream ends with its error.

SGLang puts no chat template around the prompt of /api/generate and passes a typed one over on /api/chat, takes the name
from its tokenizer manager, reports every end as `stop`, drops the text that comes with the last part of a stream, and
passes `format` over. models.py has the list.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from starlette.responses import JSONResponse

from kt_sglang.edge.adapters import ASKED
from kt_sglang.edge.chat_template import ASSISTANT, has_template
from kt_sglang.edge.defaults import ALL_TOKENS, defaults_of
from kt_sglang.edge.endings import end_of
from kt_sglang.edge.errors import sentence

OPTIONS = {"seed": "sampling_seed", "min_p": "min_p", "repeat_penalty": "repetition_penalty"}
"""Ollama's options that SGLang names wrongly or passes over → SGLang's names."""
UNBOUNDED = (-1, -2)
"""Ollama's num_predict for as many tokens as there is room for, and its default; SGLang takes 2048, and refuses a
prompt that leaves no room for them."""
FORMAT = "format"
"""The option by which a request's format gets to where its options are read."""


class Aborted(Exception):
    """Why a stream ended before its answer was complete."""


class AnswersAsAsked:
    """SGLang's tokenizer manager for its Ollama routes."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @property
    def served_model_name(self) -> str:
        """The requested id, else the base's."""
        asked = ASKED.get()
        return asked.id if asked else str(self._manager.served_model_name)

    async def generate_request(self, request: Any, *others: Any) -> AsyncIterator[Any]:
        """SGLang's answers; the last part of a stream comes once more as one that is not the last, since SGLang takes
        no text from the last one. Raises Aborted in a stream."""
        async for part in self._manager.generate_request(request, *others):
            meta = part["meta_info"]
            reason = meta.get("finish_reason")
            if request.stream and isinstance(reason, dict) and reason.get("type") == "abort":
                raise Aborted(reason.get("message"))
            if request.stream and reason is not None:
                yield {**part, "meta_info": {**meta, "finish_reason": None}}
            yield part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def after_ollama_init(result: None, serving: Any, manager: Any) -> None:
    """AFTER hook of `OllamaServing.__init__`."""
    serving.tokenizer_manager = AnswersAsAsked(manager)


async def around_stream(original: Callable[..., Any], serving: Any, *others: Any) -> Any:
    """AROUND hook of `OllamaServing._stream_chat_response` and `_stream_generate_response`. The first line is awaited,
    so that an invalid request is refused instead of answered by half a stream. Raises ValueError."""
    response = await original(serving, *others)
    lines = _with_error(_with_end(response.body_iterator, others[0]))
    try:
        first = await anext(lines)
    except StopAsyncIteration:
        first = b""
    response.body_iterator = _begun(first, lines)
    return response


async def around_whole(original: Callable[..., Any], serving: Any, request: Any, *others: Any) -> Any:
    """AROUND hook of `OllamaServing._generate_chat_response` and `_generate_generate_response`."""
    response = await original(serving, request, *others)
    response.done_reason = done_reason(request)
    return response


async def around_handle(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND hook of `OllamaServing.handle_chat` and `handle_generate`. Raises ValueError, which is answered with
    400."""
    if request.format:
        request.options = {**(request.options or {}), FORMAT: request.format}
    chat = raw_request.app.state.openai_serving_chat
    messages = messages_of(request, chat)
    if messages == []:
        return JSONResponse(loaded(serving))
    if messages is None:
        return await original(serving, request, raw_request)
    made = _worded(serving, chat, messages, request)
    kind = "generate" if hasattr(request, "prompt") else "chat"
    how = f"_stream_{kind}_response" if request.stream else f"_generate_{kind}_response"
    return await getattr(serving, how)(made, raw_request, serving.tokenizer_manager.served_model_name)


def loaded(serving: Any) -> dict[str, Any]:
    """Ollama's answer to a chat in which nothing was said, which asks for the model to be loaded."""
    made: dict[str, Any] = {
        "model": serving.tokenizer_manager.served_model_name,
        "created_at": serving._get_timestamp(),
    }
    return {**made, "message": {"role": ASSISTANT, "content": ""}, "done": True, "done_reason": "load"}


def messages_of(request: Any, chat: Any) -> list[dict[str, str]] | None:
    """What the chat template is put around; None for a prompt that is taken as it is: a raw one, that of a model
    without a template, which Ollama puts nothing around either, and an empty one, which asks for no answer."""
    if not hasattr(request, "prompt"):
        return [{"role": each.role, "content": each.content} for each in request.messages]
    if not request.prompt.strip():
        request.system = None
        return None
    if request.raw or not has_template(chat):
        return None
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": request.prompt}]


def _worded(serving: Any, chat: Any, messages: list[dict[str, str]], request: Any) -> Any:
    """SGLang's request, with the tokens and stops that /v1/chat/completions makes of the messages; as Ollama does, an
    answer goes on from a last message of the assistant. Raises ValueError."""
    from pydantic import ValidationError
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.managers.io_struct import GenerateReqInput

    asked = serving._convert_options_to_sampling_params(request.options)
    stops = asked.pop("stop", None)
    try:
        talk = ChatCompletionRequest.model_validate({"model": request.model, "messages": messages, "stop": stops})
        talk.continue_final_message = bool(messages) and messages[-1]["role"] == ASSISTANT
    except ValidationError as failure:
        raise ValueError(sentence(failure.errors())[1]) from failure
    worded = chat._process_messages(talk, False)
    asked["stop"] = worded.stop
    return GenerateReqInput(input_ids=worded.prompt_ids, sampling_params=asked, stream=request.stream)


def around_convert_options(original: Callable[..., Any], serving: Any, options: Any = None) -> Any:
    """AROUND hook of `OllamaServing._convert_options_to_sampling_params`. SGLang knows no sampling parameter `seed`, so
    that a request with one was refused."""
    options = {name: value for name, value in (options or {}).items() if value is not None}
    asked = {**defaults_of(serving), **original(serving, options)}
    asked.pop("seed", None)
    if options.get("num_predict", UNBOUNDED[0]) in UNBOUNDED:
        asked["max_new_tokens"] = None
    if asked.get("top_k") == 0:
        asked["top_k"] = ALL_TOKENS
    asked |= {name: options[option] for option, name in OPTIONS.items() if option in options}
    if wanted := options.get(FORMAT):
        asked["json_schema"] = orjson.dumps({"type": "object"} if wanted == "json" else wanted).decode()
    return asked


def done_reason(request: Any) -> str:
    """Ollama's word for why the answer ended: stop or length."""
    reason = end_of(request).get("finish_reason")
    return "length" if isinstance(reason, dict) and reason.get("type") == "length" else "stop"


async def _with_end(lines: AsyncIterator[bytes], request: Any) -> AsyncIterator[bytes]:
    """The last line says why the answer ends, and how many tokens prompt and answer have."""
    async for line in lines:
        said = orjson.loads(line)
        if said.get("done"):
            meta = end_of(request)
            counts = {"prompt_eval_count": meta.get("prompt_tokens"), "eval_count": meta.get("completion_tokens")}
            line = orjson.dumps({**said, **counts, "done_reason": done_reason(request)}) + b"\n"
        yield line


async def _begun(first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for line in lines:
        yield line


async def _with_error(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Ollama's own form of an error within a stream: a line with only the error. Raises ValueError before the first
    line, for an invalid request."""
    begun = False
    try:
        async for line in lines:
            begun = True
            yield line
    except ValueError as failure:
        if not begun:
            raise
        yield orjson.dumps({"error": str(failure)}) + b"\n"
    except Aborted as failure:
        yield orjson.dumps({"error": str(failure)}) + b"\n"
