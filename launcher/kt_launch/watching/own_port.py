"""HTTP servers that the launcher runs itself, each in a thread: metrics, the playground, adapters of many servers."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any, TypeVar

from kt_model.errors import LaunchError

Server = TypeVar("Server", bound=BaseServer)
POLL_S = 0.1
"""How long the end of a server may take to be noticed by it."""


class OwnServer(ThreadingHTTPServer):
    """One whose clients may go away at any time."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client's disconnect is not our error."""


class OwnHandler(BaseHTTPRequestHandler):
    """One request. Nothing of it is logged."""

    server_version, sys_version = "kt-launch", ""
    timeout = 60.0
    """Seconds after which a client that sends or reads nothing is disconnected."""

    def log_message(self, *_: object) -> None:
        """Requests are private, and the servers behind this one have logs of their own."""

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers of an answer that ends with its connection."""
        self.send_response(status, http.client.responses.get(status, ""))
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def give(self, content: bytes, kind: str, headers: Mapping[str, str], status: int = 200) -> None:
        """A whole answer."""
        self.begin(status, {"Content-Type": kind, "Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def read_body(self, most_bytes: int) -> bytes | None:
        """The request's content; None if it has no length, or is longer."""
        length = self.headers.get("Content-Length", "")
        return self.rfile.read(int(length)) if length.isdecimal() and int(length) <= most_bytes else None


@contextlib.contextmanager
def answering(key: str, host: str, port: int, begin: Callable[[], tuple[Server, threading.Thread]]) -> Iterator[Server]:
    """Runs what `begin` starts until the block ends. key: where the port was typed; 0 stands for a free one. Raises
    LaunchError if the port cannot be used."""
    try:
        server, thread = begin()
    except OSError as failure:
        problem = f"{port} on {host} cannot be used: {failure.strerror}"
        raise LaunchError(key, problem, f"Set {key}=0 for a free port.") from failure
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_thread(server: Server) -> tuple[Server, threading.Thread]:
    """The server, and the thread in which it answers from now on."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    return server, thread
