"""Whether a server works, as the launcher sees it: processes that call themselves as SGLang's do, and an answer that
always comes.
"""

from __future__ import annotations

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
from kt_launch.watching.liveness import Liveness, Unresponsive

NAMED = "exec -a sglang::detokenizer sleep 600"
HANG_S = 6.0


class Answers(BaseHTTPRequestHandler):
    """Schedulers that have nothing to complain of."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def connect() -> Iterator[Callable[[float], httpx.Client]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
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
