"""Streamed answers: one request to /v1/chat/completions, its pieces of text, and how fast they arrive."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from kt_model.errors import LaunchError, ServerDidNotStart
from kt_model.printable import KEPT, printable

ROUTE = "/v1/chat/completions"
END = "[DONE]"
AT_ONCE_S = 0.001
"""Between pieces that came in one read: no server is faster."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass
class Answer:
    """The answer so far. tokens: as counted by the server at the end, until then the number of pieces."""

    text: str = ""
    tokens: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    problem: str = ""
    stopped: bool = False
    """Stopped by the user."""
    pieces: int = field(default=0, repr=False)
    together: int = field(default=0, repr=False)
    """Pieces that came at once with the first one: the time between them says nothing."""

    @property
    def speed(self) -> float | None:
        """Tokens per second after those that came first; None if all came at once."""
        spent = self.last_at - self.first_at
        return (self.tokens - self.together) / spent if self.tokens > self.together and spent > 0 else None

    def add(self, piece: str, now: float) -> None:
        """Append a piece that came at this time, in seconds."""
        if self.together == self.pieces and (not self.pieces or now - self.last_at < AT_ONCE_S):
            self.together, self.first_at = self.together + 1, now
        self.text, self.last_at, self.pieces = self.text + piece, now, self.pieces + 1
        self.tokens = max(self.tokens, self.pieces)

    @property
    def summary(self) -> str:
        """In a few words: `12 tokens, 34.5 tokens/s`."""
        if self.problem:
            return f"no answer: {self.problem}"
        speed = f", {self.speed:.1f} tokens/s" if self.speed else ""
        return f"{self.tokens} tokens{speed}{', stopped' if self.stopped else ''}"


def stream(
    client: httpx.Client, model: str, messages: Sequence[Message], options: dict[str, Any], answer: Answer
) -> Iterator[str]:
    """The answer's pieces, printable; `answer` is extended with each. A refusal becomes its `problem`. Raises
    ServerDidNotStart if the server no longer answers. Closing the iterator aborts the request."""
    body = {
        "model": model,
        "messages": [{"role": one.role, "content": one.content} for one in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    try:
        with client.stream("POST", ROUTE, json=body) as response:
            if not response.is_success:
                answer.problem = problem_of(response.read(), response.status_code)
                return
            for event in _events(response):
                if piece := _take(event, answer):
                    yield piece
    except httpx.HTTPError as failure:
        raise unreachable(client, failure) from failure


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == END:
            continue
        try:
            event = json.loads(data)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def _take(event: dict[str, Any], answer: Answer) -> str:
    """Add the event to the answer; returns its text."""
    if "error" in event:
        answer.problem = problem_of(json.dumps(event).encode(), 500)
    if usage := event.get("usage"):
        answer.tokens = int(usage.get("completion_tokens") or answer.tokens)
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    piece = printable(str(delta.get("content") or ""), KEPT)
    if piece:
        answer.add(piece, time.monotonic())
    return piece


def problem_of(content: bytes, status: int) -> str:
    """A server's reason for refusing a request."""
    try:
        told = json.loads(content)
    except ValueError:
        told = {}
    told = told.get("error", told) if isinstance(told, dict) else {}
    message = told.get("message") if isinstance(told, dict) else told
    return printable(str(message or f"HTTP status {status}"))


def read_ids(client: httpx.Client) -> list[str]:
    """The names that requests can use now, the base model first. Raises LaunchError."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as failure:
        raise unreachable(client, failure) from failure
    if response.status_code == httpx.codes.UNAUTHORIZED:
        fix = "Set server.api_key=env:NAME or server.api_key=file:/path/to/file."
        raise LaunchError("chat", f"{client.base_url} requires a key", fix)
    try:
        models = response.raise_for_status().json()["data"]
        return [printable(str(one["id"])) for one in sorted(models, key=lambda one: bool(one.get("parent")))]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as failure:
        problem = f"{client.base_url} has no OpenAI API: {failure}"
        raise LaunchError("chat", problem, "Choose another address.") from failure


def unreachable(client: httpx.Client, failure: Exception) -> ServerDidNotStart:
    problem = f"{client.base_url} does not answer ({str(failure) or type(failure).__name__})"
    return ServerDidNotStart("chat", problem, "kt-launch runs lists the recorded runs.")
