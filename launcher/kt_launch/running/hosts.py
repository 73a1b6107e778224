"""The launchers of several hosts that serve one model: they meet before anything starts, compare what each is about to
start, and stay connected for as long as they run, so that each notices when another is gone.

They meet at server.rendezvous, where SGLang's own processes meet afterwards: host 0 stops listening before it starts
SGLang, and the connections stay. A line is a JSON object; an empty one says that its sender lives. Whatever ends on one
host ends on all: a part of a model answers nobody.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from kt_launch.machine.processes import Stopped
from kt_launch.running.sameness import differences, facts_of
from kt_model.errors import ServerDidNotStart
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say

BEAT_S = 5.0
LOST_S = 30.0
"""Silence after which another host counts as lost."""
RETRY_S = 0.5
TOLD_S = 10.0
"""How often it is said who is waited for."""
MOST_BYTES = 1 << 20
"""No line is longer; others end the connection."""
KEY = "server.nodes"


class HostGone(Exception):
    """Another host ended, or nothing is heard of it any more."""


class Link:
    """A connection to another host's launcher, which sends a sign of life every so often once `keep` was called."""

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._heard_at = time.monotonic()
        self._over = threading.Event()
        self.name = name
        self.ready = threading.Event()
        self.ended = ""
        """Why the other side ended, in its words."""

    def send(self, **message: Any) -> None:
        """One line; an empty one without a message. What cannot be sent is noticed by what is not heard."""
        line = (json.dumps(message) if message else "") + "\n"
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(line.encode())

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next line. Raises OSError when there is none in time, and ValueError on what is none of ours."""
        self._connection.settimeout(timeout_s)
        line = self._lines.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the connection ended")
        message = json.loads(line) if line.strip() else {}
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def keep(self) -> None:
        """From now on both sides listen for each other, in threads of their own."""
        self._heard_at = time.monotonic()
        for target in (self._listen, self._beat):
            threading.Thread(target=target, name=f"link to {self.name}", daemon=True).start()

    def require(self) -> None:
        """Raise HostGone unless the other side was heard lately."""
        if self.ended:
            raise HostGone(f"{self.name}: {self.ended}")
        if time.monotonic() - self._heard_at > LOST_S:
            raise HostGone(f"{self.name} has not been heard of for {LOST_S:g} s")

    def close(self, reason: str = "") -> None:
        self._over.set()
        if reason:
            self.send(ended=reason)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._connection.close()

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
        except (OSError, ValueError):
            self.ended = self.ended or "its connection ended"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self.send()


class Hosts:
    """The other hosts of one start, from `with` to its end; nobody where the plan has one host only."""

    def __init__(self, plan: LaunchPlan) -> None:
        server = plan.config["server"]
        self._plan = plan
        self.count = int(server.get("nodes", 1))
        self.number = int(plan.value("server.node_rank")) if self.count > 1 else 0
        self._timeout_s = float(server["start_timeout_s"])
        self._links: list[Link] = []

    @property
    def is_part(self) -> bool:
        """Whether this host answers no requests: host 0 does."""
        return self.number > 0

    @property
    def others_ready(self) -> bool:
        """Of a part: whether host 0 has proven the server."""
        return all(link.ready.is_set() for link in self._links)

    def __enter__(self) -> Self:
        """Meet. Raises ServerDidNotStart naming the host that is missing or another one's."""
        if self.count > 1:
            try:
                self._links = [self._join()] if self.is_part else self._gather()
            except OSError as failure:
                raise ServerDidNotStart(
                    "server.rendezvous",
                    f"hosts cannot meet at {self._place()}: {failure.strerror or failure}",
                    "Set server.rendezvous=<address of host 0>:<free port>, the same on all hosts.",
                ) from failure
            for link in self._links:
                link.keep()
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, *_: object) -> None:
        reason = "its server ended" if failure is None else f"it failed ({failure})"
        reason = "it was interrupted" if isinstance(failure, Stopped) else reason
        for link in self._links:
            link.close(reason)

    def require_all(self) -> None:
        """Raise HostGone when one of them is gone."""
        for link in self._links:
            link.require()

    def say_ready(self) -> None:
        """Tell the others that the server is proven."""
        for link in self._links:
            link.send(ready=True)

    def _place(self) -> str:
        return str(self._plan.value("server.rendezvous"))

    def _address(self) -> tuple[str, int]:
        host, _, port = self._place().rpartition(":")
        return host.strip("[]"), int(port)

    def _gather(self) -> list[Link]:
        """Host 0: wait for all others, each with the same facts as here."""
        links: dict[int, Link] = {}
        facts, deadline = facts_of(self._plan), time.monotonic() + self._timeout_s
        host, port = self._address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.create_server((host, port), family=family) as listener:
                for _ in self._waiting(deadline, links):
                    listener.settimeout(RETRY_S)
                    with contextlib.suppress(TimeoutError):
                        self._welcome(listener.accept()[0], facts, links)
                    if len(links) == self.count - 1:
                        break
        except BaseException:
            for link in links.values():
                link.close("it did not start")
            raise
        for link in links.values():
            link.send(go=True)
        return list(links.values())

    def _waiting(self, deadline: float, links: Mapping[int, Link]) -> Iterator[None]:
        told_at = time.monotonic()
        while True:
            yield
            missing = [number for number in range(1, self.count) if number not in links]
            names = " and ".join(f"host {number}" for number in missing)
            if time.monotonic() > deadline:
                problem = f"{names} of {self.count} did not come to {self._place()} within {self._timeout_s:g} s"
                fix = f"Start the same command there with server.node_rank={missing[0]}."
                raise ServerDidNotStart(KEY, problem, fix)
            if missing and time.monotonic() - told_at > TOLD_S:
                told_at = time.monotonic()
                say(f"waiting for {names} at {self._place()}")

    def _welcome(self, connection: socket.socket, facts: Mapping[str, str], links: dict[int, Link]) -> None:
        """A newcomer: strangers and a second one of a number are sent away, one of other facts ends the start."""
        link = Link(connection)
        try:
            said = link.receive(RETRY_S * 10)
            number, others = int(said["host"]), {str(key): str(value) for key, value in said["facts"].items()}
            name = f"host {number} ({printable(str(said['name'])[:100])})"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            link.close()
            return
        link.name = name
        if not 0 < number < self.count or number in links:
            taken = "there is one already" if number in links else f"expected 1 to {self.count - 1}"
            link.send(refused=f"server.node_rank: {number}, but {taken}")
            link.close()
            return
        if differs := differences(facts, others, name):
            problem = "; ".join(differs)
            link.send(refused=f"{KEY}: {problem}")
            link.close()
            raise ServerDidNotStart(KEY, problem, "Make the hosts alike: they serve one model together.")
        links[number] = link

    def _join(self) -> Link:
        """Another host: find host 0, and be let in."""
        link = Link(self._connect(), "host 0")
        link.send(host=self.number, name=socket.gethostname(), facts=facts_of(self._plan))
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            try:
                said = link.receive(TOLD_S)
            except TimeoutError:
                say("waiting for the other hosts")
                continue
            except (OSError, ValueError) as failure:
                raise ServerDidNotStart(
                    KEY, f"host 0 at {self._place()} ended: {failure}", "See there why."
                ) from failure
            if said.get("go"):
                return link
            problem = printable(str(said.get("refused") or said.get("ended") or said)[:1000])
            raise ServerDidNotStart(KEY, f"host 0 says: {problem}", "Make the hosts alike, and start both again.")
        raise ServerDidNotStart(KEY, f"host 0 at {self._place()} did not start in time", "See there what it waits for.")

    def _connect(self) -> socket.socket:
        deadline, told_at = time.monotonic() + self._timeout_s, time.monotonic()
        while True:
            try:
                return socket.create_connection(self._address(), timeout=TOLD_S)
            except OSError as failure:
                if isinstance(failure, socket.gaierror) or time.monotonic() > deadline:
                    problem = f"host 0 does not listen at {self._place()} ({failure.strerror or failure})"
                    fix = "Start the same command there with server.node_rank=0, or mend server.rendezvous."
                    raise ServerDidNotStart("server.rendezvous", problem, fix) from failure
            if time.monotonic() - told_at > TOLD_S:
                told_at = time.monotonic()
                say(f"waiting for host 0 at {self._place()}")
            time.sleep(RETRY_S)
