"""An authenticated connection between the launchers of two hosts. It carries lines of JSON, each with an HMAC-SHA256
over the message and its sequence number, keyed with the launch's secret, so that nobody else can send or replay one.
After `keep_alive`, each side sends an empty object at intervals as a heartbeat.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from typing import Any

from kt_model.printable import printable

BEAT_S = 5.0
LOST_S = 30.0
"""Silence after which another host counts as lost."""
MOST_BYTES = 1 << 20
"""Longer lines end the connection."""


class HostGone(Exception):
    """Another host has ended, or has been silent for too long."""


class HandshakeFailed(Exception):
    """The other side is not a launcher of this launch, or does not know its secret."""


class Peer:
    """One end of the connection. name: of the other host, for messages."""

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        connection.settimeout(LOST_S)
        self._connection = connection
        self._unread = b""
        self._key = b""
        self._own, self._other = "", ""
        self._sent = self._received = 0
        self._sending = threading.Lock()
        self._heard_at = time.monotonic()
        self._over = threading.Event()
        self.name = name
        self.ready = threading.Event()
        self.ended = ""
        """Why the other side ended, in its own words."""

    def greet(self, secret: bytes, timeout_s: float) -> dict[str, Any]:
        """On host 0: the new host's first message, which proves that it knows the secret. Raises OSError,
        HandshakeFailed."""
        nonce = secrets.token_hex(16)
        self._write(json.dumps({"kt-launch": nonce}))
        line = self._read_line(timeout_s)
        try:
            theirs = str(json.loads(line.partition(b" ")[2])["nonce"])
        except (ValueError, KeyError, TypeError) as failure:
            raise HandshakeFailed("it sent an unexpected message") from failure
        self._agree(secret, nonce, theirs, "0", "1")
        return self._opened(line)

    def introduce(self, secret: bytes, timeout_s: float, **message: Any) -> None:
        """On another host: introduce itself to host 0. Raises OSError, HandshakeFailed."""
        try:
            theirs = str(json.loads(self._read_line(timeout_s))["kt-launch"])
        except (ValueError, KeyError, TypeError) as failure:
            raise HandshakeFailed("another program listens there") from failure
        nonce = secrets.token_hex(16)
        self._agree(secret, theirs, nonce, "1", "0")
        self.send(nonce=nonce, **message)

    def send(self, **message: Any) -> None:
        """Send one line. A failure shows up as the other side's silence."""
        text = json.dumps(message)
        with self._sending:
            self._write(f"{self._code(self._own, self._sent, text.encode())} {text}")
            self._sent += 1

    def send_away(self, reason: str) -> None:
        """Reject a connection that does not know our secret, and close it."""
        self._write(json.dumps({"refused": reason}))
        self.close()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next line. Raises OSError if none arrives in time, HandshakeFailed if it is not authentic."""
        return self._opened(self._read_line(timeout_s))

    def keep_alive(self) -> None:
        """Send heartbeats and listen for those of the other side, in threads."""
        self._heard_at = time.monotonic()
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name=f"peer to {self.name}", daemon=True).start()

    def require_alive(self) -> None:
        """Raise HostGone if the other side has ended or been silent for LOST_S."""
        if self.ended:
            raise HostGone(f"{self.name}: {self.ended}")
        if time.monotonic() - self._heard_at > LOST_S:
            raise HostGone(f"{self.name} has been silent for {LOST_S:g} s")

    def close(self, reason: str = "") -> None:
        self._over.set()
        if reason:
            self.send(ended=reason)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _agree(self, secret: bytes, first: str, second: str, own: str, other: str) -> None:
        """Derive a key for this connection alone, from nonces of both sides."""
        self._key = hmac.digest(secret, f"{first} {second}".encode(), "sha256")
        self._own, self._other = own, other

    def _code(self, side: str, number: int, text: bytes) -> str:
        return hmac.digest(self._key, f"{side} {number} ".encode() + text, "sha256").hex()

    def _opened(self, line: bytes) -> dict[str, Any]:
        if line.startswith(b"{"):
            raise HandshakeFailed(_reason_in(line))
        code, _, text = line.partition(b" ")
        if not hmac.compare_digest(code, self._code(self._other, self._received, text).encode()):
            raise HandshakeFailed("it does not know this launch's secret")
        self._received += 1
        message = json.loads(text)
        if not isinstance(message, dict):
            raise HandshakeFailed("it sent an unexpected message")
        return message

    def _read_line(self, timeout_s: float) -> bytes:
        """Raises OSError if no complete line arrives in time."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._connection], [], [], left_s)[0]:
                raise TimeoutError(f"nothing came within {timeout_s:g} s")
            piece = self._connection.recv(1 << 16)
            if not piece or len(self._unread) > MOST_BYTES:
                raise ConnectionResetError("the connection ended")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{line}\n".encode())

    def _listen(self) -> None:
        try:
            while not self._over.is_set():
                message = self.receive(LOST_S)
                self._heard_at = time.monotonic()
                if "ended" in message:
                    self.ended = printable(str(message["ended"])[:500])
                    return
                if message.get("ready"):
                    self.ready.set()
        except TimeoutError:
            return
        except (OSError, ValueError, HandshakeFailed):
            self.ended = self.ended or "its connection ended"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self.send()


def _reason_in(line: bytes) -> str:
    """The reason given by the side that rejected us."""
    try:
        return printable(str(json.loads(line)["refused"])[:500])
    except (ValueError, KeyError, TypeError):
        return "it sent an unexpected message"
