"""The chat's parts: commands, what each model is told of the conversation, and answers of servers that misbehave. A
real server is asked in tests/server/test_talking.py.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from launching import LONG_S
from typing_terminal import Terminal

from kt_launch.cli import main
from kt_launch.running.child_launcher import ChildLauncher, Told
from kt_launch.talking.answers import Answer, Message, read_ids, stream
from kt_launch.talking.conversation import HELP, Conversation, Quit
from kt_launch.talking.terminal import Chat, folded
from kt_model.errors import LaunchError, ServerDidNotStart

IDS = ["demo", "demo:west", "demo:chef"]


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


ANSWERS: dict[str, bytes] = {
    "escapes": event("\033[31mred\033]0;title\007") + event("\u202eright to left\nline\ttab\r") + b"data: [DONE]\n\n",
    "broken": b"data: {not json}\n\ndata: [1]\n\n: a comment\n\n" + event("fine") + b"data: [DONE]\n\n",
    "error": event("half") + b'data: {"error": {"message": "out of \\u001b[2Jmemory"}}\n\n',
    "counted": event("a")
    + event("b")
    + b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n',
}


class StandIn(BaseHTTPRequestHandler):
    """Answers as the model's name says."""

    def do_GET(self) -> None:
        models = [{"id": name, "parent": "demo" if ":" in name else None} for name in reversed(IDS)]
        self.give(200, json.dumps({"data": models}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] == "refused":
            self.give(404, b'{"error": {"message": "no model \\u001b[31mrefused"}}')
        elif asked["model"] == "demo":
            self.send_response(200)
            self.end_headers()
            for number in range(600):
                self.wfile.write(event(f"word{number} "))
                self.wfile.flush()
                time.sleep(0.1)
        elif asked["model"] == "dies":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(event("half an"))
        else:
            self.give(200, ANSWERS[asked["model"]])

    def give(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # who asked has gone
            super().handle()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as made:
        yield made


def ask(client: httpx.Client, model: str) -> Answer:
    answer = Answer()
    pieces = list(stream(client, model, [Message("user", "hello")], {}, answer))
    assert "".join(pieces) == answer.text
    return answer


def test_what_a_model_writes_moves_no_cursor(client: httpx.Client) -> None:
    assert ask(client, "escapes").text == "\\x1b[31mred\\x1b]0;title\\x07\\u202eright to left\nline\ttab\\r"


def test_tokens_are_those_that_the_server_counts(client: httpx.Client) -> None:
    assert ask(client, "counted").tokens == 7
    assert ask(client, "broken").summary == "1 tokens"


def test_pieces_that_came_at_once_make_no_rate() -> None:
    """As the first answer of a fresh server comes: 53,358 tokens/s was told."""
    answer = Answer()
    for number in range(10):
        answer.add("word ", 5.0 + number * 2e-5)
    assert answer.summary == "10 tokens"
    for number in range(1, 11):
        answer.add("word ", 5.0 + number * 0.1)
    assert answer.summary.startswith("20 tokens, 10.0 tokens/s")


def test_a_refusal_is_told_and_a_server_that_goes_is_an_error(client: httpx.Client) -> None:
    assert ask(client, "refused").summary == "no answer: no model \\x1b[31mrefused"
    assert ask(client, "error").summary == "no answer: out of \\x1b[2Jmemory"
    with pytest.raises(ServerDidNotStart, match="does not answer"):
        ask(client, "dies")


def test_the_base_comes_first(client: httpx.Client) -> None:
    assert read_ids(client)[0] == "demo"


@pytest.mark.parametrize("words", [("chat.url=127.0.0.1:1",), ("chat.url=http://127.0.0.1:1",), ("run=no-such-run",)])
def test_a_server_that_is_not_there_is_one_line(
    words: tuple[str, ...], tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", f"paths.runs={tmp_path}", *words]) in (2, 3)
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_ctrl_c_stops_the_answer_and_not_the_chat(url: str) -> None:
    terminal = Terminal(f"chat.url={url}")
    try:
        terminal.wait_for("demo> ")
        terminal.type("tell me everything\r")
        terminal.wait_for("word3 ")
        terminal.type("\x03")
        terminal.wait_for(r"\(\d+ tokens, [\d.]+ tokens/s, stopped\)")
        terminal.wait_for("demo> ")
        terminal.type("/adapter\r")
        terminal.wait_for("adapters: chef, west")
        terminal.wait_for("demo> ")
        terminal.type("\x04")
        assert terminal.process.wait(LONG_S) == 0
    finally:
        terminal.close()


def test_ctrl_c_between_an_answer_and_the_prompt_does_not_end_the_chat(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["/base", "/adapter"])
    kept: Callable[[str], str] = Conversation(lambda: IDS).command

    def command(line: str) -> str:
        if line == "/base":
            raise KeyboardInterrupt
        return kept(line)

    def read(_: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    conversation = Conversation(lambda: IDS)
    monkeypatch.setattr(conversation, "command", command)
    chat = Chat(client, conversation, {})
    chat._typed = True
    assert chat.run() == 0
    assert "adapters: west, chef" in capsys.readouterr().err


def test_commands_choose_whom_to_ask() -> None:
    conversation = Conversation(lambda: IDS)
    assert conversation.asked == ["demo"]
    conversation.command("/adapter chef")
    assert conversation.asked == ["demo:chef"]
    conversation.command("/compare")
    assert conversation.asked == ["demo", "demo:chef"]
    conversation.command("/compare west")
    assert conversation.asked == ["demo", "demo:west"]
    conversation.command("/base")
    assert conversation.asked == ["demo"]
    assert conversation.command("/adapter") == "adapters: west, chef"
    assert all(command.split()[0] in conversation.command("/help") for command in HELP)
    with pytest.raises(Quit):
        conversation.command("/quit")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/adapter wset", "adapter: no adapter wset. Did you mean west?"),
        ("/compre", "/compre: no such command. Did you mean /compare?"),
        ("/zzz", "/zzz: no such command. /help lists them."),
    ],
)
def test_slips_are_told_what_was_meant(line: str, said: str) -> None:
    with pytest.raises(LaunchError) as failed:
        Conversation(lambda: IDS).command(line)
    assert str(failed.value) == said


def test_without_adapters_there_is_nothing_to_compare() -> None:
    with pytest.raises(LaunchError, match="demo has no adapters"):
        Conversation(lambda: IDS[:1]).command("/compare")


def test_each_model_hears_its_own_answers_and_those_of_others_where_it_has_none() -> None:
    conversation = Conversation(lambda: IDS, system="be brief")
    conversation.ask("one").answers.update({"demo": "base 1", "demo:west": "west 1"})
    conversation.ask("two").answers["demo"] = "base 2"
    conversation.ask("three").answers["demo"] = "not yet to be heard"
    said = [message.content for message in conversation.messages("demo:west")]
    assert said == ["be brief", "one", "west 1", "two", "base 2", "three"]
    conversation.command("/clear")
    assert [message.role for message in conversation.messages("demo")] == ["system"]


def test_columns_fold_words_and_keep_lines() -> None:
    assert folded("one two three\n\nfour", 9) == ["one two", "three", "", "four"]


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ("demo_west", "no adapter nope in this launch, expected one of west. Set chat.adapter=west."),
        ("none", "no adapter nope in this launch, and none is chosen. Set lora=/path/to/folder."),
    ],
)
def test_an_adapter_that_a_new_server_would_not_have(lora: str, told: str, launch: Callable[..., Any]) -> None:
    asked = launch("chat", "model=demo", f"lora={lora}", "server=cpu", "chat.adapter=nope")
    assert asked.code == 2 and asked.err.endswith(f"error: chat.adapter: {told}\n")


def test_a_chat_prepares_what_its_server_needs_and_tells_an_error_once(
    launch: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a start does, kt.prepare included; the error that the launcher prints is also the one that start() raises."""

    def start(self: ChildLauncher, out: Told, err: Told | None = None) -> None:
        assert err is not None
        err("a line of the start\n")
        err("error: server: it ended. Try again.\n")
        raise ServerDidNotStart("server", "it ended", "Try again.")

    monkeypatch.setattr(ChildLauncher, "start", start)
    monkeypatch.setattr(ChildLauncher, "stop", lambda self: None)
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path / "cache"))
    asked = launch("chat", f"model={checkpoint}", "server=cpu", "kt.method=int8", "kt.prepare=true")
    assert asked.code == 3 and asked.err.endswith("\na line of the start\nerror: server: it ended. Try again.\n")
    assert asked.err.count("it ended") == 1
    assert [*(tmp_path / "cache" / "weights").glob("*/*.safetensors")]
