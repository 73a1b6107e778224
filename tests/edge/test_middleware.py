"""The middleware before a small application: bodies, streams, exceptions and headers pass as they came."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route as Path

from kt_sglang.edge import errors
from kt_sglang.edge.adapters import ASKED, Served
from kt_sglang.edge.asgi import Edge, Paths
from kt_sglang.edge.errors import sentence
from kt_sglang.edge.forms import form_of, formed
from kt_sglang.edge.info import after_build_server_info
from kt_sglang.edge.keys import after_add_api_key_middleware, around_decide_request_auth
from kt_sglang.edge.lengths import ALWAYS, MOST_PROMPTS, require_fitting
from kt_sglang.edge.origins import Origins, is_for_this_machine
from kt_sglang.edge.requests import Model, Refused, Route

SERVED = Served("demo", 512, {"west": "/adapters/west"})


async def echo(request: Request) -> JSONResponse:
    asked = ASKED.get()
    body = await request.body()
    length = request.headers.get("content-length")
    return JSONResponse({"body": body.decode(), "length": length, "asked": asked.id if asked else None})


async def stream(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number} {ASKED.get().id}\n"  # type: ignore[union-attr]

    return StreamingResponse(parts())


async def log(request: Request) -> JSONResponse:
    return JSONResponse({"body": (await request.body()).decode()})


async def fail(request: Request) -> JSONResponse:
    raise ValueError("no such parser")


async def break_off(request: Request) -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield "begun"
        raise ValueError("late")

    return StreamingResponse(parts())


async def broken(request: Request) -> JSONResponse:
    told = {"object": "error", "message": "top_p must be in (0, 1]", "type": "BadRequestError", "param": None}
    return JSONResponse({**told, "code": 400}, 400)


async def ready(request: Request) -> JSONResponse:
    return JSONResponse("SGLang's own")


PATHS = Paths(
    names={"/echo": Route(Model.OPTIONAL), "/stream": Route(Model.OPTIONAL)},
    refused={"/weights": "they do not change"},
    at_fault={"/fail": (ValueError,), "/break_off": (ValueError,)},
    fields={"/log": {"folder": "files would be written anywhere"}},
    admin=frozenset({"/pause"}),
)
ENDPOINTS = (echo, stream, log, fail, break_off, broken, ready)
ROUTES = [Path(f"/{each.__name__}", each, methods=["POST"]) for each in ENDPOINTS]
APP = Starlette(
    routes=[*ROUTES, Path("/v1/broken", broken, methods=["POST"])],
    middleware=[Middleware(Edge, paths=PATHS, read_served=lambda: SERVED)],
)


async def post(path: str, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as edge:
        return await edge.post(path, **options)


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_fields_that_name_files_are_refused_and_others_arrive() -> None:
    refused = run(post("/log", json={"level": 1, "folder": "/tmp"}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "folder")
    assert refused.json()["error"]["message"] == "folder of /log is not offered: files would be written anywhere."
    for body in ({"level": 1}, {"folder": None}):
        assert json.loads(run(post("/log", json=body)).json()["body"]) == body
    assert run(post("/log")).json() == {"body": ""}


def test_a_body_with_other_names_arrives_whole_and_with_its_length() -> None:
    answer = run(post("/echo", json={"model": "west", "n": 1, "text": "ü" * 100})).json()
    assert json.loads(answer["body"]) == {"model": "demo:west", "n": 1, "text": "ü" * 100}
    assert int(answer["length"]) == len(answer["body"].encode())
    assert answer["asked"] == "demo:west"


@pytest.mark.parametrize("raw", [b"", b'{"model": "demo",  "temperature": 1.0}'])
def test_what_needs_no_change_is_passed_byte_by_byte(raw: bytes) -> None:
    answer = run(post("/echo", content=raw)).json()
    assert answer["body"].encode() == raw


NO_OBJECTS = {
    b"{": "the body is not JSON: ",
    b"null": "the body is null, expected a JSON object",
    b'"x"': 'the body is "x", expected a JSON object',
    b"[1, 2]": "the body is [1,2], expected a JSON object",
    b"[" + b"1," * 100 + b"1]": "the body is [1,1,1,1,1,1,1,1,1,1…, expected a JSON object",
    b'{"folder": "/tmp", "level": NaN}': "the body is not JSON: ",
    '{"folder": "/tmp"}'.encode("utf-16"): "the body is not JSON: ",
    b"[" * 100_000: "the body is not JSON: ",
    b'{"a":' * 5000 + b"1" + b"}" * 5000: "the body is not JSON: ",
}
"""Some of which other readers of JSON would take, so that what stands in them would be obeyed unseen."""


@pytest.mark.parametrize("raw", NO_OBJECTS, ids=lambda raw: repr(raw[:12]))
def test_what_is_no_json_object_goes_no_further(raw: bytes) -> None:
    for path in ("/echo", "/log"):
        refused = run(post(path, content=raw))
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
        assert refused.json()["error"]["message"].startswith(NO_OBJECTS[raw])


LONG = "x" * (ALWAYS + 1)
TOO_LONG: list[dict[str, Any]] = [
    {"prompt": LONG},
    {"text": ["short", LONG]},
    {"input_ids": [1] * (ALWAYS + 1)},
    {"input_ids": [[1], [1] * (ALWAYS + 1)]},
    {
        "messages": [
            {"role": "user", "content": LONG[:200_000]},
            {"role": "user", "content": [{"text": LONG[:100_000]}]},
        ]
    },
    {"messages": [{}] * 10 + [{"role": "user", "content": [[LONG]]}]},
    {"instances": [{"text": LONG}]},
]
FITTING: list[dict[str, Any]] = [
    {"prompt": LONG[1:]},
    {"prompt": [LONG[1:]] * 3},
    {"input_ids": [[1] * ALWAYS] * 3},
    {"stop": LONG},
    {"prompt": None},
    {"prompt": 7},
]


@pytest.mark.parametrize("body", TOO_LONG, ids=lambda body: next(iter(body)))
def test_what_cannot_fit_into_the_context_is_refused_before_it_is_read(body: dict[str, Any]) -> None:
    """SGLang would make tokens of it first, while everybody waits."""
    refused = run(post("/echo", json=body))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] == next(iter(body))


def test_prompts_are_counted() -> None:
    for field, prompt in (("prompt", "Hi"), ("input_ids", [5]), ("text", "Hi"), ("tools", {"type": "function"})):
        assert run(post("/echo", json={field: [prompt] * MOST_PROMPTS})).status_code == 200
        refused = run(post("/echo", json={field: [prompt] * (MOST_PROMPTS + 1)}))
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            400, f"{field}: got 2049 of them, expected at most 2048 in one request",
        )  # fmt: skip
    assert run(post("/echo", json={"input_ids": [5] * (MOST_PROMPTS + 1)})).status_code == 200


def test_what_may_fit_goes_on_and_the_whole_request_is_bounded() -> None:
    for body in FITTING:
        assert run(post("/echo", json=body)).status_code == 200, body.keys()
    refused = run(post("/echo", json={"prompt": [LONG[1:]] * 17}))
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        413, "the request has more than 4456448 characters in its fields",
    )  # fmt: skip
    require_fitting({"prompt": "x" * (1 << 20)}, 1 << 16)
    require_fitting({"prompt": ["x" * (1 << 24)]}, 1 << 20)
    with pytest.raises(Refused, match="more than 1048576 characters, the model's context is 65536 tokens"):
        require_fitting({"prompt": "x" * ((1 << 20) + 1)}, 1 << 16)


def test_a_body_that_has_no_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_sglang.edge.asgi.MOST_BYTES", 1 << 20)
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * (1 << 18)

    refused = run(post("/echo", content=pieces()))
    assert (refused.status_code, refused.json()["error"]["message"]) == (413, "the body has more than 1 MiB")
    assert sent < 10


def test_what_acts_on_all_is_off_without_an_admin_key() -> None:
    refused = run(post("/pause", json={}))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_admin_key")
    assert refused.json()["error"]["message"].startswith("/pause is off: it acts on what others ask")


def test_a_websocket_is_closed_before_it_is_opened() -> None:
    """SGLang asks for a key on HTTP requests only, and browsers let every page open one."""
    said: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        said.append(message)

    run(APP({"type": "websocket", "path": "/v1/realtime", "headers": [], "query_string": b""}, receive, send))
    assert [message["type"] for message in said] == ["websocket.close"]


def test_probes_hear_what_the_launcher_says(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers, but is not proven yet or does not work, gets no requests."""
    file = tmp_path / "state.json"

    def ready() -> tuple[int, Any]:
        answer = run(post("/ready", json={}))
        return answer.status_code, answer.json()

    assert ready() == (200, "SGLang's own"), "where nobody launched it"
    monkeypatch.setenv("KT_LAUNCH_RUN_FOLDER", str(tmp_path))
    assert ready() == (503, {"state": "unknown"})
    for state in ("starting", "restarting", "unresponsive", "ended"):
        file.write_text(json.dumps({"state": state, "url": "http://127.0.0.1:1"}))
        assert ready() == (503, {"state": state})
    file.write_text(json.dumps({"state": "ready"}))
    assert ready() == (200, "SGLang's own")
    for damaged in ("[]", "{", "5", '{"state": null}'):
        file.write_text(damaged)
        assert ready()[0] == 503


def test_errors_of_sglang_have_openais_form_on_openais_routes() -> None:
    failed = run(post("/v1/broken", json={}))
    assert failed.status_code == 400
    assert failed.json() == {
        "object": "error",
        "message": "top_p must be in (0, 1]",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
        "error": {
            "message": "top_p must be in (0, 1]",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": None,
        },
    }
    assert int(failed.headers["content-length"]) == len(failed.content)
    assert run(post("/broken", json={})).json().keys() == {"object", "message", "type", "param", "code"}


NOBODY = "Got LoRA adapter that has never been loaded: west\nAll loaded adapters: dict_keys([])."
TOO_MANY = "The input (9 tokens) is longer than the model's context length (8 tokens)."
NO_ROOM = "Input length (7 tokens) exceeds the maximum allowed length (2 tokens). Use a shorter input or enable it."
UNKNOWN = "the key is missing or wrong: send it as Authorization: Bearer KEY"
TOOL = "Tool 0 function has invalid 'parameters' schema: 5 is not of type 'object'"
GONE = "model: there is no adapter named 'west' any more. GET /v1/models lists all."
FORMS: list[tuple[str, int, dict[str, Any], int, Any]] = [
    ("/v1/x", 404, {"detail": "Not Found"}, 404, ("Not Found", "invalid_request_error", None, None)),
    ("/v1/x", 401, {"error": "Unauthorized"}, 401, (UNKNOWN, "invalid_request_error", None, "invalid_api_key")),
    ("/v1/x", 400, {"object": "error", "message": TOO_MANY, "code": 400}, 400,
     (TOO_MANY, "invalid_request_error", None, "context_length_exceeded")),
    ("/v1/x", 400, {"object": "error", "message": NO_ROOM, "code": 400}, 400,
     (NO_ROOM, "invalid_request_error", None, "context_length_exceeded")),
    ("/v1/x", 400, {"error": {"message": "tools: no None", "type": "invalid_request_error", "code": 400}}, 400,
     ("tools: no", "invalid_request_error", "tools", None)),
    ("/v1/x", 400, {"object": "error", "message": NOBODY}, 404,
     (GONE, "invalid_request_error", "model", "model_not_found")),
    ("/v1/x", 400, {"object": "error", "message": f"{TOOL}\n\nFailed validating 'a'"}, 400,
     (TOOL, "invalid_request_error", None, None)),
    ("/v1/x", 500, {"object": "error", "message": "n: broken"}, 500, ("n: broken", "server_error", None, None)),
    ("/v1/messages", 401, {"error": "Unauthorized"}, 401, (UNKNOWN, "authentication_error")),
    ("/v1/messages", 400, {"type": "error", "error": {"message": TOO_MANY, "type": "BadRequestError"}}, 400,
     (TOO_MANY, "invalid_request_error")),
    ("/v1/messages", 400, {"error": {"message": NOBODY}}, 404, (GONE, "not_found_error")),
    ("/api/ps", 404, {"detail": "Not Found"}, 404, "Not Found"),
]  # fmt: skip
"""Path, SGLang's status and body, status and error for the client."""
KEYS = ("message", "type", "param", "code")


@pytest.mark.parametrize(("path", "status", "body", "told", "error"), FORMS)
def test_what_sglang_says_gets_the_form_of_the_protocol(
    path: str, status: int, body: dict[str, Any], told: int, error: Any
) -> None:
    form = form_of(path)
    assert form is not None and form_of("/generate") is None
    said, raw = formed(form, status, json.dumps(body).encode())
    found = json.loads(raw)["error"]
    assert said == told
    assert (found if isinstance(error, str) else tuple(found[key] for key in KEYS[: len(error)])) == error
    assert formed(form, said, raw) == (said, raw), "what has the form already is left alone"
    assert formed(form, status, b"no JSON") == (status, b"no JSON")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, 401),
        ({"x-api-key": "k"}, 200),
        ({"x-api-key": "no"}, 401),
        ({"Authorization": "Bearer k"}, 200),
        ({"Authorization": "Bearer no", "x-api-key": "k"}, 401),
    ],
)
def test_a_key_in_anthropics_header_is_one(header: dict[str, str], status: int) -> None:
    app = Starlette(routes=[Path("/v1/messages", ready, methods=["POST"])])
    add_api_key_middleware(app, api_key="k", admin_api_key=None)
    after_add_api_key_middleware(None, app, api_key="k", admin_api_key=None)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            return await client.post("/v1/messages", headers=header)

    answer = run(ask())
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["type"] == "authentication_error"


MESSAGES_OF: list[tuple[Any, str]] = [
    ({"role": "user", "content": None}, "messages: Input should be a valid string, or Input should be a valid list"),
    ({"role": "robot", "content": "Hi"}, "messages: 'role' must be one of "),
    ({"role": "user", "content": [{"type": "text"}]}, "messages: text: Field required"),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
     "messages: Input should be 'text', got 'refusal'"),
    ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages: Input should be 'text', got 'file'"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "said"), MESSAGES_OF)
def test_of_a_message_is_said_what_its_own_kind_lacks(message: Any, said: str) -> None:
    with pytest.raises(ValidationError) as wrong:
        ChatCompletionRequest.model_validate({"model": "demo", "messages": [message]})
    named, text = sentence([{**error, "loc": ("body", *error["loc"])} for error in wrong.value.errors()])
    assert (named, text[: len(said)]) == ("messages", said)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"n": "x"}, "n", "n: Input should be a valid integer, unable to parse string as an integer"),
        ({"stop": 5}, "stop", "stop: Input should be a valid string, or Input should be a valid list"),
        (
            {"n": "x", "stop": 5},
            "n",
            "n: Input should be a valid integer, unable to parse string as an integer; stop: ",
        ),
        (5, "", "the body: expected a JSON object"),
    ],
)
def test_a_body_of_another_form_is_told_by_its_field(fields: Any, field: str, said: str) -> None:
    class Body(BaseModel):
        n: int = 1
        stop: str | list[str] | None = None

    with pytest.raises(ValidationError) as wrong:
        Body.model_validate(fields)
    named, text = sentence([{**error, "loc": ("body", *error["loc"])} for error in wrong.value.errors()])
    assert named == field
    assert text.startswith(said)


def test_a_body_in_pieces_is_put_together() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"mo', b'del": "we', b'st"}'):
            yield piece

    assert run(post("/echo", content=pieces())).json()["asked"] == "demo:west"


def test_streams_know_who_was_asked() -> None:
    assert run(post("/stream", json={"model": "west"})).text == "0 demo:west\n1 demo:west\n2 demo:west\n"


def test_errors_have_the_form_of_the_routes_protocol() -> None:
    error = run(post("/echo", json={"model": "wset"}))
    assert error.status_code == 404
    assert error.json() == {
        "error": {
            "message": "model: there is no model named 'wset'. Did you mean 'demo:west'? GET /v1/models lists all.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    told = error.json()["error"]["message"]
    for path, kind in (("/api/chat", None), ("/v1/messages", "not_found_error")):
        body = json.loads(bytes(errors.answer(path, Refused(404, "model", told)).body))
        assert (body["error"] == told) if kind is None else (body["error"]["type"] == kind)
    refused = run(post("/weights"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_offered")
    assert refused.json()["error"]["message"] == "/weights is not offered: they do not change."


def test_an_exception_that_means_a_wrong_request_is_400_unless_the_answer_has_begun() -> None:
    failed = run(post("/fail"))
    assert (failed.status_code, failed.json()["error"]["message"]) == (400, "/fail: no such parser")
    begun = run(post("/break_off"))
    assert (begun.status_code, begun.text) == (200, "begun")


def test_a_client_that_leaves_while_it_sends_is_left() -> None:
    messages = [{"type": "http.request", "body": b'{"mo', "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/echo", "headers": [], "query_string": b""}

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    run(APP(scope, receive, send))
    assert messages == []


def test_each_answer_names_the_start_of_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_LAUNCH_START", "5f3a")
    app = Starlette(routes=APP.routes, middleware=APP.user_middleware)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            return [await client.post(path, json={}) for path in ("/echo", "/stream", "/weights", "/fail", "/nowhere")]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200, 200, 501, 400, 404]
    assert all(answer.headers["x-kt-launch-start"] == "5f3a" for answer in answers)


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "edge", 200),
        ("http://127.0.0.1:30000", "127.0.0.1:30000", 200),
        ("http://[::1]:30000", "[::1]:30000", 200),
        ("http://localhost:30000", "localhost:30000", 200),
        ("http://127.0.0.1:30001", "127.0.0.1:30000", 403),
        ("https://chat.example.com", "edge", 200),
        ("https://evil.example.com", "edge", 403),
        ("http://evil.example.com:30000", "evil.example.com:30000", 403),  # a name that means 127.0.0.1 by now
        ("http://[::1:30000", "[::1:30000", 400),
        ("null", "edge", 403),
    ],
)
def test_only_named_pages_may_ask(origin: str | None, host: str, status: int) -> None:
    app = Starlette(routes=APP.routes, middleware=[Middleware(Origins, allowed=["https://chat.example.com"])])

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            page = {} if origin is None else {"Origin": origin}
            return await client.post("/echo", json={}, headers={"Host": host, **page})

    assert asyncio.run(ask()).status_code == status


@pytest.mark.parametrize(
    ("site", "status"), [("none", 200), ("same-origin", 200), ("cross-site", 403), ("same-site", 403)]
)
def test_pictures_and_links_of_other_pages_ask_nothing(site: str, status: int) -> None:
    """As `<img src=http://127.0.0.1:30000/flush_cache>`, with which browsers send no origin."""
    app = Starlette(routes=APP.routes, middleware=[Middleware(Origins, allowed=["https://chat.example.com"])])

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:30000") as client:
            return await client.post("/echo", json={}, headers={"Sec-Fetch-Site": site})

    assert asyncio.run(ask()).status_code == status


HOSTS = {
    "127.0.0.1:30000": 200,
    "[::1]:30000": 200,
    "localhost": 200,
    "app.localhost:30000": 200,
    "chat.example.com": 200,
    "evil.example.com:30000": 403,
    "localhost.example.com": 403,
    "edge": 403,
    "x/health?": 400,
    "127.0.0.1:30000/health#": 400,
    "a@127.0.0.1": 400,
    "127.0.0.1, 127.0.0.1": 400,
    "": 400,
}
"""Host → status of a request that is only read, for which a browser sends no origin."""


@pytest.mark.parametrize("host", HOSTS, ids=repr)
def test_a_server_for_this_machine_answers_to_no_name_that_others_can_point_here(host: str) -> None:

    async def ask(*middleware: Middleware) -> int:
        app = Starlette(routes=APP.routes, middleware=middleware)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://edge") as client:
            return (await client.post("/echo", json={}, headers={"Host": host})).status_code

    own = Middleware(Origins, allowed=["https://chat.example.com"], for_this_machine=True)
    assert asyncio.run(ask(own)) == HOSTS[host]
    assert asyncio.run(ask(Middleware(Origins, allowed=[]))) == (200 if HOSTS[host] == 403 else HOSTS[host])


@pytest.mark.parametrize(
    ("host", "key", "own"),
    [
        ("127.0.0.1", None, True), ("localhost", None, True), ("::1", None, True), ("127.0.0.1", "k", False),
        ("0.0.0.0", None, False), ("gpu-1.example.com", None, False),
    ],
)  # fmt: skip
def test_a_server_is_for_this_machine_on_a_loopback_address_without_a_key(
    host: str, key: str | None, own: bool
) -> None:
    assert is_for_this_machine(host, key) is own


def test_a_key_of_other_letters_is_a_wrong_one() -> None:
    def decide(authorization_header: str | None, api_key: str) -> bool:
        return authorization_header is not None and secrets.compare_digest(authorization_header, api_key)

    decided = [
        around_decide_request_auth(decide, authorization_header=header, api_key="k") for header in ("k", "é", "", None)
    ]
    assert decided == [True, False, False, False]


def test_server_info_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_LAUNCH_HIDDEN_KEY_0", "sk-of-mine")
    shown = after_build_server_info(
        {
            "api_key": "sk-of-mine",
            "launch_command": "serve --api-key sk-of-mine",
            "port": 1,
            "list": [{"k": "sk-of-mine"}],
        },
        SimpleNamespace(tokenizer_worker_num=1),
    )
    assert shown == {
        "api_key": "***",
        "launch_command": "serve --api-key ***",
        "port": 1,
        "list": [{"k": "***"}],
        "kt_launch_outputs_received": 0,
    }


def test_one_of_several_http_processes_does_not_tell_what_came_back_to_all() -> None:
    assert after_build_server_info({}, SimpleNamespace(tokenizer_worker_num=2)) == {"kt_launch_outputs_received": None}
