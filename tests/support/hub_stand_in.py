"""A stand-in for the Hugging Face Hub's HTTP interface: repositories of one commit each, out of folders. It answers
what the Hub's own package asks (a repository, its tree, files with ranges), notes every request, and can cut one off.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """url: its address. repositories: name -> folder. cut: file -> bytes after which its next answer ends."""

    repositories: dict[str, Path] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, range) of each request."""
    tokens: list[str] = field(default_factory=list)
    url: str = ""

    def files(self) -> list[str]:
        """Names of files whose content was asked for."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """On a free port of loopback."""
    hub = Hub()

    class Handler(Answers):
        shared = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Answers(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    shared: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.shared.asked.append((self.command, path, self.headers.get("Range", "")))
        if token := self.headers.get("Authorization"):
            self.shared.tokens.append(token)
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and "/".join(words[2:4]) in self.shared.repositories:
            name = "/".join(words[2:4])
            return self._give(_tree(self.shared.repositories[name]) if "tree" in words else {"id": name, "sha": COMMIT})
        folder = self.shared.repositories.get("/".join(words[:2]))
        file = folder.joinpath(*words[4:]) if folder else None
        if words[2:3] != ["resolve"] or file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if folder else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self._send_file(file)

    def _give(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text if self.command == "GET" else b"")

    def _send_file(self, file: Path) -> None:
        content = file.read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "GET":
            cut = self.shared.cut.pop(file.name, None)
            self.wfile.write(content[first:] if cut is None else content[first : first + cut])
            if cut is not None:
                self.close_connection = True


def _tree(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
