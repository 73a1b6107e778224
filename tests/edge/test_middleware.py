"""The middleware before a small application: bodies, streams, exceptions and headers pass as they came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route as Path

from kt_sglang.edge.adapters import ASKED, Served
from kt_sglang.edge.asgi import Edge, Paths
from kt_sglang.edge.info import after_build_server_info
from kt_sglang.edge.origins import Origins
from kt_sglang.edge.requests import Model, Route

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


PATHS = Paths(
    names={"/echo": Route(Model.OPTIONAL), "/stream": Route(Model.OPTIONAL)},
    refused={"/weights": "they do not change"},
    at_fault={"/fail": (ValueError,), "/break_off": (ValueError,)},
    fields={"/log": {"folder": "files would be written anywhere"}},
)
APP = Starlette(
    routes=[Path(f"/{each.__name__}", each, methods=["POST"]) for each in (echo, stream, log, fail, break_off)],
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
    for body in ({"level": 1}, {"folder": None}, ["folder"]):
        assert json.loads(run(post("/log", json=body)).json()["body"]) == body
    assert run(post("/log")).json() == {"body": ""}


def test_a_body_with_other_names_arrives_whole_and_with_its_length() -> None:
    answer = run(post("/echo", json={"model": "west", "n": 1, "text": "ü" * 100})).json()
    assert json.loads(answer["body"]) == {"model": "demo:west", "n": 1, "text": "ü" * 100}
    assert int(answer["length"]) == len(answer["body"].encode())
    assert answer["asked"] == "demo:west"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2]", b'{"model": "demo",  "temperature": 1.0}'])
def test_what_needs_no_change_is_passed_byte_by_byte(raw: bytes) -> None:
    answer = run(post("/echo", content=raw)).json()
    assert answer["body"].encode() == raw


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
        ("http://[::1:30000", "[::1:30000", 403),
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


def test_server_info_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_LAUNCH_HIDDEN_KEY_0", "sk-of-mine")
    shown = after_build_server_info(
        {
            "api_key": "sk-of-mine",
            "launch_command": "serve --api-key sk-of-mine",
            "port": 1,
            "list": [{"k": "sk-of-mine"}],
        }
    )
    assert shown == {"api_key": "***", "launch_command": "serve --api-key ***", "port": 1, "list": [{"k": "***"}]}
