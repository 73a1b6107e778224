"""Adapters on several servers at once: on all or on none, again on one that starts again. Real HTTP, servers of a few
lines that answer as SGLang's do; tests/cluster/test_behind_router.py has real ones."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from kt_launch.cli import main
from kt_launch.cluster import adapters_port
from kt_launch.cluster.adapters import Worker, connected, level, load, read_all, restore, unload
from kt_launch.watching.client import Keys
from kt_model.errors import LaunchError

KEY, ADMIN_KEY = "a key", "an admin key"


@dataclass
class Server:
    """refuses: what it says instead of loading; stays: whether it cannot unload; behind: what it lists as a router;
    rank: what it finds in any adapter."""

    adapters: dict[str, str] = field(default_factory=dict)
    rank: int = 4
    refuses: str = ""
    stays: bool = False
    behind: list[str] | None = None
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            ids = [{"id": f"m:{name}", "root": root, "parent": "m"} for name, root in self.adapters.items()]
            return 200, {"data": [{"id": "m", "root": "m", "parent": None}, *ids]}
        if path == "/workers" and self.behind is not None:
            return 200, {"workers": [{"url": url} for url in self.behind]}
        return 404, {}

    def post(self, path: str, asked: dict[str, str]) -> tuple[int, Any]:
        name = asked["lora_name"]
        self.asked.append(f"{path} {name}")
        if path == "/load_lora_adapter":
            if self.refuses or name in self.adapters:
                return 400, {"success": False, "error_message": self.refuses or "it is there already"}
            self.adapters[name] = asked["lora_path"]
            return 200, {"success": True, "error_message": "", "adapter": {"name": name, "rank": self.rank}}
        if self.stays or name not in self.adapters:
            return 400, {"success": False, "error_message": "it cannot go"}
        del self.adapters[name]
        return 200, {"success": True}


@dataclass
class Running:
    """A server that listens."""

    server: Server
    http: ThreadingHTTPServer

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.server.url = f"http://127.0.0.1:{self.http.server_port}"
        return self.server

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def running(server: Server) -> Running:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(KEY, lambda: server.get(self.path))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.give(ADMIN_KEY, lambda: server.post(self.path, asked))

        def give(self, key: str, answer: Callable[[], tuple[int, Any]]) -> None:
            known = self.headers.get("Authorization") == f"Bearer {key}"
            status, content = answer() if known else (401, {"error": "Unauthorized"})
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    return Running(server, ThreadingHTTPServer(("127.0.0.1", 0), Answers))


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(Server({"west": "/adapters/west"}))) for _ in range(2)]


@pytest.fixture
def keys() -> Keys:
    return Keys(["--api-key", KEY, "--admin-api-key", ADMIN_KEY])


@pytest.fixture
def workers(servers: list[Server], keys: Keys) -> Iterator[list[Worker]]:
    with connected([server.url for server in servers], keys) as found:
        yield found


def test_an_adapter_is_loaded_on_all_and_unloaded_from_all(servers: list[Server], workers: list[Worker]) -> None:
    change = load(workers, "east", "/adapters/east")
    assert (change.success, change.kept) == (True, tuple(server.url for server in servers))
    assert {**change.found[servers[1].url]}["adapter"] == {"name": "east", "rank": 4}
    expected = {"west": "/adapters/west", "east": "/adapters/east"}
    assert read_all(workers) == {server.url: expected for server in servers}
    assert unload(workers, "east").success
    assert [server.adapters for server in servers] == [{"west": "/adapters/west"}] * 2


def test_what_one_refuses_is_taken_from_the_others_again(servers: list[Server], workers: list[Worker]) -> None:
    servers[1].refuses = "its rank is 64, but this server keeps room for 16"
    change = load(workers, "east", "/adapters/east")
    assert not change.success and change.kept == ()
    assert change.message == f"east was not loaded, no server has it. {servers[1].url}: {servers[1].refuses}"
    assert [server.adapters for server in servers] == [{"west": "/adapters/west"}] * 2


def test_what_cannot_be_taken_back_is_told(servers: list[Server], workers: list[Worker]) -> None:
    servers[0].stays, servers[1].refuses = True, "no"
    change = load(workers, "east", "/adapters/east")
    assert change.kept == (servers[0].url,)
    assert change.message.startswith(f"east was not loaded, it is on {servers[0].url}. ")
    gone = unload(workers, "west")
    assert not gone.success and gone.kept == (servers[0].url,)
    assert gone.message == f"west is still on {servers[0].url}. {servers[0].url}: it cannot go"


def test_loading_what_some_have_gives_it_to_the_rest(servers: list[Server], workers: list[Worker]) -> None:
    del servers[0].adapters["west"]
    assert load(workers, "west", "/adapters/west").success
    assert servers[0].adapters == servers[1].adapters
    assert servers[1].asked == []


def test_hosts_that_find_other_files_at_a_path_have_nothing_of_it(servers: list[Server], workers: list[Worker]) -> None:
    servers[1].rank = 8
    change = load(workers, "east", "/adapters/east")
    assert change.message == f"east was not loaded, no server has it. {servers[1].url}: its rank is 8, elsewhere 4"
    assert [server.adapters for server in servers] == [{"west": "/adapters/west"}] * 2


def test_all_have_the_checkpoint_that_some_have_already(servers: list[Server], workers: list[Worker]) -> None:
    servers[0].adapters["trained"] = "/runs/one/checkpoint-5"
    assert load(workers, "trained", "/runs/one").success
    assert servers[1].adapters["trained"] == "/runs/one/checkpoint-5"


def test_another_adapter_of_that_name_changes_nothing(servers: list[Server], workers: list[Worker]) -> None:
    del servers[0].adapters["west"]
    with pytest.raises(LaunchError, match="has another adapter west, from /adapters/west"):
        load(workers, "west", "/adapters/other")
    assert [server.asked for server in servers] == [[], []]


def test_nothing_changes_where_one_does_not_answer(servers: list[Server], keys: Keys) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with connected([servers[0].url, gone], keys) as workers:
            with pytest.raises(LaunchError, match=f"{gone} does not list its models"):
                load(workers, "east", "/e")
            with pytest.raises(LaunchError, match=f"{gone} does not list its models"):
                unload(workers, "west")
    assert servers[0].asked == []
    with pytest.raises(LaunchError, match="no server has an adapter north"), connected([servers[0].url], keys) as one:
        unload(one, "north")


def test_one_that_was_away_is_given_what_all_others_have(servers: list[Server], workers: list[Worker]) -> None:
    servers[0].adapters["east"] = "/adapters/east"
    assert list(level(workers)) == [f"{servers[1].url}: adapter east, which all others have, was loaded"]
    assert servers[0].adapters == servers[1].adapters
    servers[1].adapters.clear()
    servers[1].refuses = "its folder is gone"
    assert list(level(workers)) == [
        f"{servers[1].url}: adapter {name}, which all others have, is missing: its folder is gone"
        for name in ("east", "west")
    ]


def test_a_server_that_starts_again_has_what_it_had(
    servers: list[Server], workers: list[Worker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restore(workers[0].client, tmp_path)
    assert servers[0].asked == [], "nothing was loaded or unloaded before"
    (tmp_path / "adapters.json").write_text(json.dumps({"east": "/adapters/east"}))
    restore(workers[0].client, tmp_path)
    assert servers[0].adapters == {"east": "/adapters/east"}
    servers[1].refuses = "its folder is gone"
    restore(workers[1].client, tmp_path)
    assert "warning: adapter east cannot be loaded again: its folder is gone" in capsys.readouterr().err


@pytest.fixture
def port(workers: list[Worker], keys: Keys) -> Iterator[str]:
    with adapters_port.served("127.0.0.1", 0, workers, keys) as url:
        yield url


def ask(method: str, url: str, key: str | None = ADMIN_KEY, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, url, headers=headers | more.pop("headers", {}), trust_env=False, timeout=120, **more)


def test_the_port_loads_on_all_by_the_routes_of_one(servers: list[Server], port: str) -> None:
    asked = {"lora_name": "east", "lora_path": "/adapters/east"}
    answer = ask("POST", f"{port}/load_lora_adapter", json=asked)
    urls = [server.url for server in servers]
    assert answer.json() == {
        "success": True,
        "error_message": "",
        "servers": urls,
        "refused": {},
        "adapter": {"name": "east", "rank": 4},
    }
    assert ask("GET", f"{port}/adapters", KEY).json()["servers"] == {each.url: each.adapters for each in servers}
    assert ask("POST", f"{port}/unload_lora_adapter", json={"lora_name": "east"}).json()["success"]
    servers[1].refuses = "no"
    answer = ask("POST", f"{port}/load_lora_adapter", json=asked)
    assert (answer.status_code, answer.json()["refused"]) == (400, {servers[1].url: "no"})
    assert answer.json()["error_message"].startswith("east was not loaded, no server has it")


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("POST", "/load_lora_adapter", {"key": None}, 401),
        ("POST", "/load_lora_adapter", {"key": KEY}, 401),
        ("GET", "/adapters", {"key": None}, 401),
        ("POST", "/load_lora_adapter", {"headers": {"Origin": "http://127.0.0.1"}}, 403),
        ("GET", "/adapters", {"headers": {"Sec-Fetch-Site": "cross-site"}}, 403),
        ("GET", "/v1/models", {}, 404),
        ("POST", "/generate", {}, 404),
        ("POST", "/load_lora_adapter", {"content": b"[]"}, 400),
        ("POST", "/load_lora_adapter", {"content": b"{"}, 400),
        ("POST", "/load_lora_adapter", {"json": {"lora_name": "east"}}, 400),
        ("POST", "/load_lora_adapter", {"json": {"lora_name": ["east"], "lora_path": "/e"}}, 400),
        ("POST", "/unload_lora_adapter", {"json": {"lora_name": "north"}}, 400),
    ],
)
def test_the_port_refuses(
    servers: list[Server], port: str, method: str, path: str, more: dict[str, Any], status: int
) -> None:
    answer = ask(method, f"{port}{path}", **(more or {"json": {"lora_name": "a", "lora_path": "/a"}}))
    assert answer.status_code == status, answer.text
    assert answer.json()["success"] is False and answer.json()["error_message"]
    assert [server.asked for server in servers] == [[], []]


@pytest.fixture
def typed(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """kt-launch adapters, at the address of a router."""
    monkeypatch.setenv("KT_TEST_KEY", KEY)
    monkeypatch.setenv("KT_TEST_ADMIN_KEY", ADMIN_KEY)
    with running(Server(behind=[server.url for server in servers])) as router:
        own = (f"adapters.url={router.url}", "server.api_key=env:KT_TEST_KEY")
        yield lambda *words: main(["adapters", *own, "server.admin_key=env:KT_TEST_ADMIN_KEY", *words])


def test_the_command_changes_all_behind_a_router(
    servers: list[Server], typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("adapters.load.east=/adapters/east", "adapters.unload=[west]", "--json") == 0
    urls = [server.url for server in servers]
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"name": "east", "path": "/adapters/east", "servers": urls, "lacking": []}
    servers[1].refuses = "no"
    assert typed("adapters.load.north=/adapters/north") == 3
    said = capsys.readouterr()
    assert said.err == f"error: adapters: north was not loaded, no server has it. {urls[1]}: no\n"
    assert "east" in said.out and "north" not in said.out
    del servers[1].adapters["east"]
    assert typed("--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["lacking"] == [urls[1]]


def test_a_folder_starts_where_it_was_typed(
    servers: list[Server],
    typed: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A server has another working folder, where there may be an adapter of that name too; another machine has none."""
    assert typed("adapters.load.east=adapters/east") == 2
    problem = "error: adapters.load.east: adapters/east is relative, but the servers are at http://127.0.0.1:"
    said = capsys.readouterr().err
    assert said.startswith(problem) and said.endswith(
        "Set adapters.load.east=/path/to/folder, as it is called there.\n"
    )
    here = connected([server.url for server in servers], Keys(["--api-key", KEY, "--admin-api-key", ADMIN_KEY]))
    monkeypatch.setattr("kt_launch.actions.adapters._workers", lambda _: here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    words = ("adapters.load.east=../east", "adapters.load.north=~/north", "adapters.load.south=/a b/x=y,(z)")
    assert main(["adapters", *words]) == 0
    expected = {"east": str(tmp_path.parent / "east"), "north": "/home/me/north", "south": "/a b/x=y,(z)"}
    assert {name: path for name, path in servers[0].adapters.items() if name != "west"} == expected


def test_the_command_says_what_is_wrong_with_the_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, servers: list[Server]
) -> None:
    assert main(["adapters", "adapters.url=ftp://x"]) == 2
    assert "ftp://x is not an address" in capsys.readouterr().err
    monkeypatch.setenv("KT_TEST_KEY", "a wrong one")
    assert main(["adapters", f"adapters.url={servers[0].url}", "server.api_key=env:KT_TEST_KEY"]) == 2
    assert "error: adapters" in capsys.readouterr().err
