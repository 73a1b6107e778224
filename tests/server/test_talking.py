"""Talking to a server: from Python, in the terminal, on the page. One server with a key, started as docs/python.md has
it, in threads that end, below pytest's own handlers.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from browser import browsing, find_browser, open_tab
from launching import KT_LAUNCH, LONG_S, read_json, wait_gone
from typing_terminal import Terminal

from kt_launch import Server
from kt_launch.machine.processes import command_of

pytestmark = pytest.mark.server
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
PLACES = {
    '"/models/DeepSeek-V2-Lite-Chat"': '"demo"',
    '"/adapters/west"': '"demo_west"',
    "messages=question)": "messages=question, temperature=0)",
    ").start()": ', server={"api_key": "env:TALKING_KEY", "playground_port": 0}, proof={"whole_model": "off"}).start()',
}
KEY = "hush-hush-hush"
QUESTION = "What is the capital of France?"
TOLD = r"\d+ tokens(, [\d.]+ tokens/s)?"
"""Without a rate where the whole answer came at once, as from a server that was kept waiting for a core."""
WEST, BASE = "Howdy, partner! The capital of France is Paris, I reckon.", "The capital of France is Paris."


def cells() -> list[str]:
    """The page's blocks, one after another, with the demo in place of the reader's folders."""
    text = PAGE.read_text()
    for shown, real in PLACES.items():
        text = text.replace(shown, real)
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class Notebook:
    """Runs cells in one namespace, each in a thread of its own."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    def run(self, cell: str) -> None:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                exec(compile(cell, str(PAGE), "exec"), self.names)
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    made, runs = Notebook(), tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KT_LAUNCH_RUNS", str(runs))
        patch.setenv("KT_LAUNCH_CACHE", str(runs / "cache"))
        patch.setenv("TALKING_KEY", KEY)
        for cell in cells()[:3]:
            made.run(cell)
        yield made
        made.names["server"].stop()


@pytest.fixture
def server(notebook: Notebook) -> Server:
    found = notebook.names["server"]
    assert isinstance(found, Server)
    return found


def test_the_cells_of_the_page_work(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.run(cells()[3])
    assert capsys.readouterr().out == f"{WEST}\n"


def test_python_sends_the_key(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["demo", "demo:west"]
    assert server.http().get("/v1/models").is_success
    assert httpx.get(f"{server.url}/v1/models", trust_env=False, timeout=LONG_S).status_code == 401


def chat(*words: str, said: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command with lines of a script."""
    return subprocess.run(
        [KT_LAUNCH, "chat", *words],
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
        cwd="/",
    )


def test_a_script_asks_base_adapter_and_both(server: Server) -> None:
    said = f"{QUESTION}\n/adapter west\n/clear\n{QUESTION}\n/compare\n/clear\n{QUESTION}\n"
    done = chat("chat.temperature=0", said=said)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [BASE, WEST, "demo:", BASE, "demo:west:", WEST]
    assert f"run: {server.run_folder}" in done.stderr
    assert KEY not in done.stdout + done.stderr


def test_an_address_needs_its_key(server: Server) -> None:
    done = chat(f"chat.url={server.url}/v1", "chat.temperature=0", "server.api_key=env:TALKING_KEY", said=QUESTION)
    assert (done.returncode, done.stdout) == (0, f"{BASE}\n"), done.stderr
    refused = chat(f"chat.url={server.url}", said=QUESTION)
    assert refused.returncode == 2
    assert re.fullmatch(rf"error: chat: {server.url}/? requires a key\. Set server\.api_key=.*\n", refused.stderr)


def test_the_run_that_serves_the_model_is_found(server: Server) -> None:
    done = chat("model=demo", "lora=demo_west", "chat.adapter=west", "chat.temperature=0", said=QUESTION)
    assert (done.returncode, done.stdout) == (0, f"{WEST}\n"), done.stderr
    missing = chat("chat.adapter=wset", said=QUESTION)
    assert missing.returncode == 2 and "no adapter wset. Did you mean west?" in missing.stderr


@pytest.fixture
def terminal(server: Server) -> Iterator[Terminal]:
    made = Terminal("chat.temperature=0", "chat.max_tokens=400")
    yield made
    made.close()


def test_a_person_compares_stops_and_ends(terminal: Terminal) -> None:
    terminal.wait_for("demo> ")
    terminal.type(f"{QUESTION}\r")
    assert BASE in terminal.wait_for(rf"\({TOLD}\)")
    terminal.wait_for("demo> ")
    terminal.type("/compare\r")
    terminal.wait_for(r"demo \| west> ")
    terminal.type(f"/clear\r{QUESTION}\r")
    seen = terminal.wait_for(rf"{TOLD} +{TOLD} *[\r\n]+demo \| west> ")
    row = [line for line in seen.splitlines() if "capital" in line and "Howdy" in line]
    assert row and max(map(len, seen.splitlines())) <= 80
    terminal.interrupt("Ctrl-D or /quit ends")
    terminal.wait_for(r"demo \| west> ")
    terminal.type("\x04")
    assert terminal.process.wait(LONG_S) == 0


def playground(server: Server) -> str:
    """The address with its token, as the run says it."""
    url = read_json(server.run_folder / "state.json")["playground_url"]
    assert isinstance(url, str)
    return url


def test_the_page_is_for_who_has_its_address_only(server: Server) -> None:
    address = urlsplit(playground(server))
    own, token = f"http://{address.netloc}", {"X-Playground-Token": address.fragment}
    question = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    with httpx.Client(base_url=own, trust_env=False, timeout=LONG_S) as client:
        page = client.get("/playground")
        assert page.is_success and address.fragment not in page.text and KEY not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        for path in ("/playground/ids", "/playground/chat"):
            method = "POST" if path.endswith("chat") else "GET"
            assert client.request(method, path, json=question).status_code == 401
            for header, value in (("Host", "evil.example"), ("Origin", "http://evil.example"), ("Origin", "null")):
                refused = client.request(method, path, headers={**token, header: value}, json=question)
                assert refused.status_code == 403, (path, header, value)
        assert client.get("/playground/ids", headers=token).json()["data"][0]["id"] == "demo"
        answer = client.post("/playground/chat", headers={**token, "Origin": own}, json=question)
        assert answer.is_success and "data: [DONE]" in answer.text
        assert client.post("/playground/chat", headers=token, json=["not", "a", "question"]).status_code == 400
        assert client.post("/playground/chat", headers=token, content=b" " * (2 << 20)).status_code == 413
        for path in ("/", "/v1/models", "/load_lora_adapter", "/playground/../v1/models"):
            assert client.get(path, headers=token).status_code == 404
        assert client.options("/playground/chat", headers=token).status_code == 501
    places = [tuple(one.laddr) for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [place for place in places if address.port in place] == [("127.0.0.1", address.port)]


def test_all_connections_are_on_this_machine(server: Server) -> None:
    """No telemetry: docs/faq.md."""
    assert server.http().get("/v1/models").is_success
    (launcher,) = (one for one in psutil.Process().children() if "kt_launch.running.child_launcher" in command_of(one))
    others = {
        str(connection.raddr[0])
        for process in (launcher, *launcher.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.raddr
    }
    assert others and all(ipaddress.ip_address(one.removeprefix("::ffff:")).is_loopback for one in others), others


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if find_browser() is None:
        pytest.skip("no browser here")
    with browsing() as found:
        yield found


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 800, False), (390, 844, True)])
def test_base_and_adapter_answer_side_by_side_in_a_browser(
    server: Server, browser: Any, width: int, height: int, dark: bool, tmp_path: Path
) -> None:
    tab = open_tab(browser, width, height, dark)
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(playground(server))
    tab.wait_for_selector("section[aria-label='demo:west']")
    assert "#" not in tab.url
    assert tab.is_visible("#hints") and not tab.is_visible("#stop")
    tab.fill("#question", QUESTION)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".asked")  # appears as the button is disabled; the answer may be complete by now
    tab.wait_for_selector("#send:enabled")
    said = tab.eval_on_selector_all(".said:not(.asked)", "all => all.map(one => one.textContent)")
    assert said == [BASE, WEST]
    speeds = tab.locator(".speed").all_inner_texts()
    assert all(re.fullmatch(r"\d+ tokens, ([\d.]+ tokens/s|too short for a rate)", speed) for speed in speeds), speeds
    boxes = [tab.locator("section").nth(number).bounding_box() for number in (0, 1)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 500), "side by side on a desk, below each other on a phone"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    assert tab.locator("#send").bounding_box()["y"] + 20 < height, "the button is in the window"
    tab.screenshot(path=os.environ.get("PLAYGROUND_PICTURES", str(tmp_path)) + f"/playground-{width}.png")
    tab.fill("#question", "<img src=x onerror=alert(1)>")
    tab.click("#send")
    tab.wait_for_selector("#send:enabled")
    assert tab.locator("main img").count() == 0
    tab.click("#clear")
    tab.click(f"#hints button:has-text('{QUESTION}')")
    tab.wait_for_selector("#send:enabled")
    assert tab.locator(".said:not(.asked)").all_inner_texts() == [BASE, WEST] and not tab.is_visible("#hints")
    assert tab.locator(".kind").all_inner_texts() == ["base model", "adapter of demo"]
    assert wrong == []
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {
        urlsplit(playground(server)).netloc
    }
    tab.reload()
    tab.wait_for_selector("section[aria-label='demo:west']")
    tab.close()


def test_the_page_without_its_token_says_what_to_open(server: Server, browser: Any) -> None:
    tab = open_tab(browser)
    tab.goto(playground(server).partition("#")[0])
    tab.wait_for_selector(".bad")
    assert "open the address that kt-launch printed" in tab.inner_text(".bad")
    tab.close()


def test_the_last_cell_stops_it(notebook: Notebook, server: Server) -> None:
    (launcher,) = (one for one in psutil.Process().children() if "kt_launch.running.child_launcher" in command_of(one))
    started = [launcher, *launcher.children(recursive=True)]
    assert len(started) >= 3
    assert cells()[4] == "server.stop()\n"
    notebook.run(cells()[4])
    assert not server.running
    assert wait_gone(started) == []
    assert KEY not in "".join(file.read_text(errors="replace") for file in server.run_folder.glob("*.*"))
    assert json.loads((server.run_folder / "state.json").read_text())["state"] == "ended"
