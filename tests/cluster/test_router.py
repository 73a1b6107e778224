"""What SGLang's router, as we start it, lets strangers, clients and web pages do; the servers behind it are stand-ins,
tests/cluster/test_behind_router.py has real ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from kt_launch.cluster.router import Router
from kt_launch.machine.host import LOOPBACK
from kt_launch.machine.ports import probe_port
from kt_launch.watching.client import ALONE, Keys
from kt_launch.watching.own_port import in_thread

pytestmark = pytest.mark.skipif(find_spec("sglang_router") is None, reason="sglang-router is not installed")
PAGE = "https://evil.example.com"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


class StandIn(BaseHTTPRequestHandler):
    """Answers everything."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"model_path": "demo", "choices": [], "object": "list", "data": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server, thread = in_thread(ThreadingHTTPServer((LOOPBACK, 0), StandIn))
    yield f"http://{LOOPBACK}:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def started(folder: Path, server: str, words: list[str], origins: list[str]) -> Router:
    port = probe_port(LOOPBACK, 0).number
    return Router(folder, LOOPBACK, port, [server], Keys(words), None, origins, "/health")


def asking(url: str, key: str | None = None, origin: str | None = None) -> httpx.Client:
    """With a connection for each request, as a refusal may end it."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"Origin": origin} if origin else {}
    return httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers, limits=ALONE)


def change(client: httpx.Client) -> dict[str, int]:
    """What changes which servers there are, or asks all of them to do something."""
    elsewhere = {"url": "http://127.0.0.1:9"}
    return {
        "list": client.get("/workers").status_code,
        "add": client.post("/workers", json=elsewhere).status_code,
        "remove": client.delete("/workers/00000000-0000-0000-0000-000000000000").status_code,
        "flush": client.post("/flush_cache").status_code,
        "read": client.post("/v1/tokenizers", json={"name": "a", "source": "/etc"}).status_code,
        "code": client.get("/wasm").status_code,
    }


def test_who_may_ask_may_not_choose_the_servers(tmp_path: Path, server: str) -> None:
    """Without any key: somebody else's server among them would get what others ask."""
    with started(tmp_path, server, [], []) as router:
        router.wait_ready(1)
        with asking(router.url) as client:
            assert client.post("/v1/chat/completions", json=CHAT).json()["choices"] == []
            assert set(change(client).values()) == {401}
            answer = client.post("/v1/completions", content=b" " * ((64 << 20) + 1))
            assert answer.status_code == 413
        assert router.healthy() == 1


def test_a_page_reads_nothing_unless_its_origin_is_named(tmp_path: Path, server: str) -> None:
    named, wanted = "https://chat.example.com", {"Access-Control-Request-Method": "POST"}
    for origins, allowed in (([], None), ([named], named)):
        with started(tmp_path, server, [], origins) as router:
            router.wait_ready(1)
            for origin, told in ((PAGE, None), (named, allowed)):
                with asking(router.url, origin=origin) as page:
                    answers = [page.get("/v1/models"), page.options("/v1/chat/completions", headers=wanted)]
                assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {told}


def test_servers_are_chosen_with_the_admin_key_alone(tmp_path: Path, server: str) -> None:
    words = ["--api-key", "for-requests", "--admin-api-key", "for-changes"]
    with started(tmp_path, server, words, []) as router:
        router.wait_ready(1)
        with asking(router.url) as stranger:
            assert stranger.post("/v1/chat/completions", json=CHAT).status_code == 401
            assert set(change(stranger).values()) == {401}
        with asking(router.url, "for-requests") as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
            assert set(change(client).values()) == {401}
        with asking(router.url, "for-changes") as administrator:
            (listed,) = administrator.get("/workers").json()["workers"]
            assert (listed["url"], administrator.post("/flush_cache").status_code) == (server, 200)
