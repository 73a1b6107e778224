"""HTTP servers that the launcher runs itself, each in a thread: metrics, the playground, adapters of many servers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from socketserver import BaseServer
from typing import TypeVar

from kt_model.errors import LaunchError

Server = TypeVar("Server", bound=BaseServer)
POLL_S = 0.1
"""How long the end of a server may take to be noticed by it."""


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
