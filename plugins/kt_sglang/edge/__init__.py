"""The server's edge: what clients see. Names of models and adapters mean the same on every route, unsupported requests
get an explanation, and no route of SGLang's can change the model unnoticed.

In the main process only, which alone serves HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from kt_sglang.seams.seam import Seam

Row = TypeVar("Row")
KEEP_ALIVE, KEPT_S = "SGLANG_TIMEOUT_KEEP_ALIVE", "120"

SEAMS = (
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "kt_sglang.edge.adapters:around_generate_request",
        "the adapter that a request names acts on every route",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_output",
        "kt_sglang.process.outputs:around_handle_batch_output",
        "a detokenizer that hangs is noticed: what came back from it is counted",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter",
        "kt_sglang.edge.adapters:around_unload_lora_adapter",
        "an adapter that was unloaded is gone, and not read again by the next request that names it",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "kt_sglang.edge.limits:around_validate_one_request",
        "a request that asks for more tokens than the model has ends itself, not the server",
    ),
    Seam(
        "sglang.srt.managers.io_struct.GenerateReqInput._handle_parallel_sampling",
        "kt_sglang.edge.limits:around_handle_parallel_sampling",
        "a request that asks for a billion answers ends itself, not the server",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize._handle_non_streaming_request",
        "kt_sglang.edge.limits:around_detokenize",
        "tokens that are none are the fault of who sent them",
    ),
    *(
        Seam(
            f"sglang.srt.entrypoints.openai.{name}._convert_to_internal_request",
            "kt_sglang.edge.limits:around_convert",
            "fields of a form that nothing can be made of are the fault of who sent them",
        )
        for name in ("serving_chat.OpenAIServingChat", "serving_completions.OpenAIServingCompletion")
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request",
        "kt_sglang.edge.seeds:around_handle_batch_request",
        "several answers to a request with a seed differ",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request",
        "kt_sglang.edge.seeds:around_send_one_request",
        "several answers to a request with a seed differ",
    ),
    Seam(
        "sglang.srt.configs.model_config.ModelConfig.get_default_sampling_params",
        "kt_sglang.edge.defaults:after_get_default_sampling_params",
        "a model that is not to be sampled from is not",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._build_sampling_params",
        "kt_sglang.edge.defaults:around_completion_params",
        "completions have the model's sampling parameters, as chats do",
    ),
    Seam(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing._convert_options_to_sampling_params",
        "kt_sglang.edge.ollama:around_convert_options",
        "options of Ollama's that SGLang has under other names",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.protocol.ResponsesRequest.to_sampling_params",
        "kt_sglang.edge.responses:around_to_sampling_params",
        "a response has as many tokens as were asked for",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._make_request",
        "kt_sglang.edge.responses:around_make_request",
        "tools that the model would not see are refused",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat.__init__",
        "kt_sglang.edge.tools:after_chat_init",
        "calls of tools are recognized",
    ),
    *(
        Seam(
            f"sglang.srt.function_call.{target}",
            f"kt_sglang.edge.cut_calls:{hook}",
            "what was to be a call of a tool and is none comes as text",
        )
        for target, hook in (
            ("function_call_parser.FunctionCallParser.parse_non_stream", "around_parse_whole"),
            ("function_call_parser.FunctionCallParser.parse_stream_chunk", "around_parse_chunk"),
            ("function_call_parser.FunctionCallParser.parse_stream_end", "around_parse_end"),
            ("json_array_parser.JsonArrayParser.parse_streaming_increment", "around_parse_json"),
            ("json_array_parser.JsonArrayParser.finish", "around_finish_json"),
        )
    ),
    Seam(
        "sglang.srt.function_call.utils.get_json_schema_constraint",
        "kt_sglang.edge.forced_calls:around_json_constraint",
        "a demanded call of a tool keeps to what the tool demands, and ends of nothing else",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.protocol.ChatCompletionRequest.to_sampling_params",
        "kt_sglang.edge.forced_calls:around_chat_sampling",
        "a demanded call has no text that could have another form",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.configure_logging",
        "kt_sglang.edge.limits:around_configure_logging",
        "a log that cannot be written is refused, before every request fails of it",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason",
        "kt_sglang.edge.nan_answers:around_handle_abort_finish_reason",
        "an answer with NaN in it is an error",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._parse_model_parameter",
        "kt_sglang.edge.adapters:around_parse_model_parameter",
        "names are understood once, at the edge",
    ),
    Seam(
        "sglang.srt.parser.template_manager.TemplateManager.guess_chat_template_from_model_path",
        "kt_sglang.edge.chat_template:around_guess_chat_template",
        "a word in the path of a model does not choose another model's chat template",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.chat_encoding.resolve_chat_encoding_spec",
        "kt_sglang.edge.chat_template:around_resolve_encoding",
        "a model without a chat template does not get that of DeepSeek-V3.2",
    ),
    Seam(
        "sglang.srt.parser.template_manager.TemplateManager._select_named_template",
        "kt_sglang.edge.chat_template:around_select_named_template",
        "of several chat templates the default one is the default",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._render_and_encode_chat_template",
        "kt_sglang.edge.chat_template:around_render",
        "a chat with tools has the one for tools, and messages are worded as they were sent",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._handle_last_assistant_message",
        "kt_sglang.edge.chat_template:around_last_assistant",
        "what an assistant said last is not the user's",
    ),
    Seam(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._convert_to_chat_completion_request",
        "kt_sglang.edge.anthropic:after_convert_request",
        "an answer of Anthropic's route goes on from what the assistant said last",
    ),
    *(
        Seam(
            f"sglang.srt.entrypoints.anthropic.serving.AnthropicServing.{name}",
            f"kt_sglang.edge.anthropic:{hook}",
            "Anthropic's clients are told which text ended an answer",
        )
        for name, hook in (
            ("_convert_response", "after_convert_response"),
            ("_generate_anthropic_stream", "around_stream"),
        )
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._check_for_unstreamed_tool_args",
        "kt_sglang.edge.cut_calls:around_unstreamed",
        "what is missing of a call that was cut short is not made up",
    ),
    Seam(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_stream_content",
        "kt_sglang.edge.logprobs:around_stream_content",
        "streamed chats have the logprobs of all tokens",
    ),
    Seam(
        "sglang.srt.utils.weight_versions.build_endpoint_weight_version_metadata",
        "kt_sglang.edge.answers:after_build_metadata",
        "metadata of answers are texts, as OpenAI's clients expect",
    ),
    Seam(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._handle_streaming",
        "kt_sglang.edge.anthropic:around_handle_streaming",
        "a stream of Anthropic's that cannot begin is an error",
    ),
    Seam(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.__init__",
        "kt_sglang.edge.ollama:after_ollama_init",
        "answers of Ollama's routes name whom the request asked",
    ),
    *(
        Seam(
            f"sglang.srt.entrypoints.ollama.serving.OllamaServing.{name}",
            "kt_sglang.edge.ollama:around_stream",
            "a stream of Ollama's that was aborted ends with its error",
        )
        for name in ("_stream_chat_response", "_stream_generate_response")
    ),
    *(
        Seam(
            f"sglang.srt.entrypoints.ollama.serving.OllamaServing.{name}",
            f"kt_sglang.edge.ollama:{hook}",
            reason,
        )
        for name, hook, reason in (
            ("_generate_chat_response", "around_whole", "Ollama's clients are told why an answer ends"),
            ("_generate_generate_response", "around_whole", "Ollama's clients are told why an answer ends"),
            ("handle_chat", "around_handle", "a chat is worded as on OpenAI's route, and a format kept to"),
            ("handle_generate", "around_handle", "a prompt is put into the chat template, and a format kept to"),
        )
    ),
    Seam(
        "sglang.srt.entrypoints.ollama.serving.OllamaServing.get_tags",
        "kt_sglang.edge.models:after_get_tags",
        "adapters stand in Ollama's list, too",
    ),
    Seam(
        "sglang.srt.utils.auth.decide_request_auth",
        "kt_sglang.edge.keys:around_decide_request_auth",
        "a key with letters that no key has is a wrong one",
    ),
    Seam(
        "sglang.srt.utils.auth.add_api_key_middleware",
        "kt_sglang.edge.keys:after_add_api_key_middleware",
        "a key in Anthropic's header is one",
    ),
    Seam(
        "sglang.srt.entrypoints.http_server._freeze_gc_after_server_warmup",
        "kt_sglang.edge.garbage:around_freeze_after_warmup",
        "what a start made is left out of garbage collections, on a server without keys, too",
    ),
    Seam(
        "sglang.srt.entrypoints.http_server.build_server_info",
        "kt_sglang.edge.info:after_build_server_info",
        "/server_info shows no key, and tells what came back from the detokenizer",
    ),
)


def install(server_args: Any) -> None:
    """Put the middleware in front of SGLang's routes, behind all other middleware. Raises SystemExit if SGLang lacks a
    route that we know."""
    from fastapi.exceptions import RequestValidationError
    from sglang.srt.entrypoints.http_server import app
    from starlette.middleware import Middleware

    from kt_sglang.edge.adapters import read_served
    from kt_sglang.edge.asgi import Edge
    from kt_sglang.edge.errors import answer_invalid
    from kt_sglang.edge.origins import Origins, allowed_origins, is_for_this_machine

    if missing := missing_endpoints():
        raise SystemExit(f"kt_sglang: SGLang has no {', '.join(missing)}, of which the names of models depend.")
    keep_connections()
    keep_for_administrators(app)
    records = server_args.expert_distribution_recorder_mode is not None
    paths = read_paths(app, records, server_args.dp_size, has_admin_key=server_args.admin_api_key is not None)
    app.exception_handlers[RequestValidationError] = answer_invalid
    app.user_middleware.append(Middleware(Edge, paths=paths, read_served=read_served))
    take_cors(app, allowed_origins())
    own = is_for_this_machine(server_args.host, server_args.api_key)
    app.user_middleware.insert(0, Middleware(Origins, allowed=allowed_origins(), for_this_machine=own))


def keep_connections() -> None:
    """Let clients, not the server, close connections without a request, unless the user has said how long they stay.

    Trigger: SGLang's servers close them after 5 s, which is also when httpx (OpenAI's client) stops using them; a
    router or proxy keeps them for 50 to 90 s. A request sent just as the server closes its connection is lost. Safe: it
    is SGLang's own setting, and closes nothing earlier. Remove when SGLang's default is longer than that of clients.
    """
    os.environ.setdefault(KEEP_ALIVE, KEPT_S)


def take_cors(app: Any, origins: list[str]) -> None:
    """SGLang lets the scripts of every web page send requests; only configured origins may. Safe because only browsers
    act on these headers. Remove when SGLang has an option for it."""
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware

    kept = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    own = [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])]
    app.user_middleware[:] = [*(own if origins else []), *kept]


def keep_for_administrators(app: Any) -> None:
    """Make SGLang's own check require the admin key, if there is one, for FOR_ADMINISTRATORS. SGLang reads this
    attribute of an endpoint at each request."""
    from sglang.srt.utils.auth import AuthLevel

    from kt_sglang.edge.blocked_routes import FOR_ADMINISTRATORS

    for route in _routes(app):
        if route.endpoint.__name__ in FOR_ADMINISTRATORS:
            route.endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL


def read_paths(app: Any, records_experts: bool = False, replicas: int = 1, has_admin_key: bool = False) -> Any:
    """The tables of requests.py and blocked_routes.py, by the paths that SGLang gave its endpoints."""
    from kt_sglang.edge.asgi import Paths
    from kt_sglang.edge.blocked_routes import AT_FAULT, AT_FAULT_BY_PATH, FIELDS, RECORDING, REFUSED, WITH_REPLICAS
    from kt_sglang.edge.elsewhere import ROUTES as ELSEWHERE
    from kt_sglang.edge.requests import ROUTES
    from kt_sglang.edge.unheard import ROUTES as UNHEARD

    unheard = {name: UNHEARD.get(name, ()) + ELSEWHERE.get(name, ()) for name in UNHEARD.keys() | ELSEWHERE.keys()}
    refused = REFUSED | ({} if records_experts else RECORDING) | (WITH_REPLICAS if replicas > 1 else {})
    at_fault = {**_by_path(app, AT_FAULT), **AT_FAULT_BY_PATH}
    admin = frozenset() if has_admin_key else frozenset(_admin_paths(app))
    tables = (_by_path(app, ROUTES), _by_path(app, refused), at_fault, _by_path(app, FIELDS), _by_path(app, unheard))
    return Paths(*tables, admin)


def missing_endpoints() -> list[str]:
    """Endpoints in our tables that the installed SGLang does not have."""
    from sglang.srt.entrypoints.http_server import app

    from kt_sglang.edge.blocked_routes import AT_FAULT, FIELDS, FOR_ADMINISTRATORS, RECORDING, REFUSED, WITH_REPLICAS
    from kt_sglang.edge.requests import ROUTES

    known = {*FOR_ADMINISTRATORS, *ROUTES, *REFUSED, *RECORDING, *WITH_REPLICAS, *AT_FAULT, *FIELDS}
    return sorted(known - {name for name, _ in _endpoints(app)})


def _admin_paths(app: Any) -> Iterator[str]:
    """Endpoints for administrators: those that SGLang itself restricts once it has an admin key, except OPEN_TO_ALL,
    and ours."""
    from sglang.srt.utils.auth import AuthLevel

    from kt_sglang.edge.blocked_routes import FOR_ADMINISTRATORS, OPEN_TO_ALL

    for route in _routes(app):
        level = getattr(route.endpoint, "_auth_level", AuthLevel.NORMAL)
        kept = level is not AuthLevel.NORMAL or route.endpoint.__name__ in FOR_ADMINISTRATORS
        if kept and route.endpoint.__name__ not in OPEN_TO_ALL:
            yield route.path


def _by_path(app: Any, table: Mapping[str, Row]) -> dict[str, Row]:
    return {path: table[name] for name, path in _endpoints(app) if name in table}


def _endpoints(app: Any) -> Iterator[tuple[str, str]]:
    """(function, path) of SGLang's own routes; one function may have several paths."""
    for route in _routes(app):
        yield route.endpoint.__name__, route.path


def _routes(app: Any) -> Iterator[Any]:
    """Routes with an endpoint, including those of routers that SGLang's application includes."""
    for route in app.routes:
        included = getattr(route, "original_router", None)
        yield from _routes(included) if included is not None else [route] * hasattr(route, "endpoint")
