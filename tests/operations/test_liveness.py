"""Whether a server works, as the launcher sees it: processes that call themselves as SGLang's do, and an answer that
always comes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import psutil
import pytest
from launching import wait_until

from kt_launch.machine.processes import command_of
from kt_launch.watching.liveness import Liveness, Unresponsive, outputs_of

NAMED = "exec -a sglang::detokenizer sleep 600"
HANG_S = 6.0


class Answers(BaseHTTPRequestHandler):
    """Schedulers that have nothing to complain of."""

    sent, received = 0, 0
    lost = 0
    """Messages that get no answer, though later ones do."""

    def do_GET(self) -> None:
        told = type(self)
        if self.path == "/health_generate":
            told.sent, told.received = told.sent + 1, told.received + (told.lost > 0)
        report = {"kt_launch": {"outputs_sent": told.sent}}
        text = json.dumps({"internal_states": [report], "kt_launch_outputs_received": told.received}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def connect() -> Iterator[Callable[[float], httpx.Client]]:
    Answers.sent = Answers.received = Answers.lost = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = False  # the last answer is given before the next test begins to count
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield lambda timeout_s: httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", timeout=timeout_s)
    server.shutdown()
    server.server_close()


@pytest.fixture
def detokenizer() -> Iterator[psutil.Process]:
    """In a session of its own, under its name."""
    process = subprocess.Popen(["bash", "-c", NAMED], start_new_session=True)
    try:
        found = psutil.Process(process.pid)
        wait_until(lambda: command_of(found).startswith("sglang::detokenizer"))
        yield found
    finally:
        process.kill()
        process.wait()


def test_a_detokenizer_that_stands_still_is_a_hang_though_schedulers_answer(
    detokenizer: psutil.Process, connect: Callable[[float], httpx.Client]
) -> None:
    with Liveness(detokenizer.pid, connect, HANG_S) as liveness:
        liveness.require_working()
        detokenizer.send_signal(signal.SIGSTOP)
        with pytest.raises(Unresponsive, match=r"^sglang::detokenizer 600 has stood still for \d+ s \(server\.hang"):
            while True:
                liveness.require_working()
                time.sleep(0.1)
        assert not liveness.answers
        detokenizer.send_signal(signal.SIGCONT)
        wait_until(lambda: detokenizer.status() != psutil.STATUS_STOPPED)
        liveness.require_working()
        wait_until(lambda: liveness.answers)


def test_standing_still_is_no_hang_where_there_is_no_limit(
    detokenizer: psutil.Process, connect: Callable[[float], httpx.Client]
) -> None:
    with Liveness(detokenizer.pid, connect, 0) as liveness:
        detokenizer.send_signal(signal.SIGSTOP)
        wait_until(lambda: detokenizer.status() == psutil.STATUS_STOPPED)
        liveness.require_working()
        assert liveness.answers


def test_a_detokenizer_that_passes_on_nothing_is_a_hang_though_schedulers_answer(
    detokenizer: psutil.Process, connect: Callable[[float], httpx.Client]
) -> None:
    with Liveness(detokenizer.pid, connect, HANG_S) as liveness:
        Answers.sent = 1
        with pytest.raises(
            Unresponsive, match=r"^its detokenizer has passed on nothing of .* for \d+ s \(server\.hang"
        ):
            while True:
                liveness.require_working()
                time.sleep(0.1)
        assert not liveness.answers
        assert Answers.sent > 1, "a generation was asked for before"
        Answers.received = Answers.sent
        wait_until(lambda: liveness.answers)
        liveness.require_working()


def test_a_message_that_gets_no_answer_is_no_hang_while_later_ones_do(
    detokenizer: psutil.Process, connect: Callable[[float], httpx.Client]
) -> None:
    with Liveness(detokenizer.pid, connect, 2 * HANG_S) as liveness:
        Answers.sent = Answers.lost = 1
        while Answers.received < 2:
            liveness.require_working()
            time.sleep(0.1)
        assert Answers.sent == Answers.received + 1


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"[]",
        b"{}",
        b'{"internal_states": [{"kt_launch": {"outputs_sent": 3}}]}',
        b'{"internal_states": [{}], "kt_launch_outputs_received": 1}',
    ],
)
def test_a_server_that_does_not_count_is_behind_with_nothing(told: bytes) -> None:
    assert outputs_of(httpx.Response(200, content=told)) == (0, 0)
