"""The launchers of several hosts that serve one model: they meet before anything starts, compare what each is about to
start, and stay connected (peer.py) as long as they run, so that each notices when another is gone.

They meet at server.rendezvous, where SGLang's own processes meet afterwards: host 0 stops listening before it starts
SGLang, and the connections stay open. A connection that does not know the launch's secret is rejected. When one host's
part ends, all end: a part of a model cannot answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

from kt_launch.cluster.consistency import differences, facts_of
from kt_launch.cluster.peer import HandshakeFailed, Peer
from kt_launch.machine.processes import Stopped
from kt_launch.watching.client import shared_key
from kt_model.errors import ServerDidNotStart
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say

RETRY_S = 0.5
ACCEPT_S = 0.1
GREETING_S = 10.0
"""How long a new connection may take to identify itself."""
MOST_GREETED = 32
"""Connections that have not identified themselves yet; further ones are closed at once."""
TOLD_S = 10.0
"""Interval of the messages about missing hosts."""
NAMES_S = 60.0
"""How long a host name may fail to resolve: a pod's does until shortly after its start."""
DIFFERENT_S = 30.0
"""Without a key anybody could pretend to be a host with different facts, so a matching one may still arrive for this
long."""
KEY = "server.nodes"
Found = TypeVar("Found")


class Hosts:
    """The other hosts of one start, from `with` to its end; empty if the plan has one host only."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self.count = int(plan.config["server"].get("nodes", 1))
        self.number = int(plan.value("server.node_rank")) if self.count > 1 else 0
        self._peers: list[Peer] = []

    @property
    def is_part(self) -> bool:
        """Whether this host answers no requests, as all but host 0."""
        return self.number > 0

    @property
    def others_ready(self) -> bool:
        """On a part: whether host 0 has proven the server."""
        return all(peer.ready.is_set() for peer in self._peers)

    def __enter__(self) -> Self:
        """Meet the others. Raises ServerDidNotStart naming the host that is missing or does not match."""
        if self.count > 1:
            try:
                self._peers = [_join(self._plan)] if self.is_part else _Gathering(self._plan).gather()
            except OSError as failure:
                raise ServerDidNotStart(
                    "server.rendezvous",
                    f"hosts cannot meet at {_place(self._plan)}: {failure.strerror or failure}",
                    "Set server.rendezvous=<address of host 0>:<free port>, the same on all hosts.",
                ) from failure
            for peer in self._peers:
                peer.keep_alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, *_: object) -> None:
        reason = "its server ended" if failure is None else f"it failed ({failure})"
        reason = "it was interrupted" if isinstance(failure, Stopped) else reason
        for peer in self._peers:
            peer.close(reason)

    def require_all(self) -> None:
        """Raise HostGone if one of them is gone."""
        for peer in self._peers:
            peer.require_alive()

    def say_ready(self) -> None:
        """Tell the others that the server is proven."""
        for peer in self._peers:
            peer.send(ready=True)


def _place(plan: LaunchPlan) -> str:
    return str(plan.value("server.rendezvous"))


def _address(plan: LaunchPlan) -> tuple[str, int]:
    host, _, port = _place(plan).rpartition(":")
    return host.strip("[]"), int(port)


def _secret(plan: LaunchPlan) -> bytes:
    """The shared secret of one launch: its key, if it has one, the number of hosts, and the model."""
    known = (shared_key(plan.argv) or "", str(plan.config["server"]["nodes"]), str(plan.value("model.name")))
    return hashlib.sha256("\n".join(known).encode()).digest()


def _with_names(attempt: Callable[[], Found], deadline: float) -> Found:
    """The attempt's value; retried for a while as long as the rendezvous' name does not resolve."""
    until = min(deadline, time.monotonic() + NAMES_S)
    while True:
        try:
            return attempt()
        except socket.gaierror:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY_S)


class _Gathering:
    """Host 0, until all others have arrived with the same facts."""

    def __init__(self, plan: LaunchPlan) -> None:
        self._plan = plan
        self._count = int(plan.config["server"]["nodes"])
        self._timeout_s = float(plan.config["server"]["start_timeout_s"])
        self._has_key, self._secret = shared_key(plan.argv) is not None, _secret(plan)
        self._arrived: queue.Queue[tuple[Peer, dict[str, Any]]] = queue.Queue()
        self._greeted = threading.Semaphore(MOST_GREETED)
        self._peers: dict[int, Peer] = {}
        self._different: dict[int, tuple[str, float]] = {}
        """Number of a host with different facts -> the differences, and when it arrived."""
        self._told: set[str] = set()

    def gather(self) -> list[Peer]:
        facts, deadline = facts_of(self._plan), time.monotonic() + self._timeout_s
        try:
            with _with_names(self._listener, deadline) as listener:
                listener.settimeout(ACCEPT_S)
                for _ in self._waiting(deadline):
                    with contextlib.suppress(TimeoutError):
                        self._greet(*listener.accept())
                    while not self._arrived.empty():
                        self._welcome(*self._arrived.get(), facts)
                    if len(self._peers) == self._count - 1:
                        break
        except BaseException:
            for peer in self._peers.values():
                peer.close("it did not start")
            raise
        for peer in self._peers.values():
            peer.send(go=True)
        return list(self._peers.values())

    def _listener(self) -> socket.socket:
        host, port = _address(self._plan)
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

    def _waiting(self, deadline: float) -> Iterator[None]:
        told_at = time.monotonic()
        while True:
            yield
            missing = [number for number in range(1, self._count) if number not in self._peers]
            names = " and ".join(f"host {number}" for number in missing)
            self._require_alike(missing, deadline)
            if time.monotonic() > deadline:
                problem = f"{names} of {self._count} did not come to {_place(self._plan)} within {self._timeout_s:g} s"
                fix = f"Start the same command there with server.node_rank={missing[0]}."
                raise ServerDidNotStart(KEY, problem, fix)
            if missing and time.monotonic() - told_at > TOLD_S:
                told_at = time.monotonic()
                say(f"waiting for {names} at {_place(self._plan)}")

    def _require_alike(self, missing: list[int], deadline: float) -> None:
        """Raise if a host with different facts arrived and none replaced it. With a key, it must have been that host
        itself."""
        patience_s = 0.0 if self._has_key else DIFFERENT_S
        for number in missing:
            problem, came_at = self._different.get(number, ("", 0.0))
            if problem and time.monotonic() > min(came_at + patience_s, deadline):
                raise ServerDidNotStart(KEY, problem, "All hosts must have the same versions, files and arguments.")

    def _greet(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        """In a thread, so that a silent connection blocks nobody."""
        peer = Peer(connection, printable(str(address[0])))
        if not self._greeted.acquire(blocking=False):
            peer.close()
            return
        threading.Thread(target=self._hear, args=(peer,), name=f"greeting {peer.name}", daemon=True).start()

    def _hear(self, peer: Peer) -> None:
        try:
            self._arrived.put((peer, peer.greet(self._secret, GREETING_S)))
        except HandshakeFailed as failure:
            self._send_away(peer, str(failure))
        except (OSError, ValueError) as failure:
            self._send_away(peer, f"it did not identify itself ({failure})")
        finally:
            self._greeted.release()

    def _send_away(self, peer: Peer, reason: str) -> None:
        """Printed once per address."""
        peer.send_away("this host belongs to another launch, or has another server.admin_key or server.api_key")
        if peer.name not in self._told:
            self._told.add(peer.name)
            say(f"meeting: {peer.name} was rejected: {reason}")

    def _welcome(self, peer: Peer, said: Mapping[str, Any], facts: Mapping[str, str]) -> None:
        """Admit a new host; reject one whose number is taken or whose facts differ, and remember the differences."""
        try:
            number, others = int(said["host"]), {str(key): str(value) for key, value in said["facts"].items()}
            name = f"host {number} ({printable(str(said['name'])[:100])})"
        except (ValueError, KeyError, TypeError, AttributeError):
            self._send_away(peer, "it sent an unexpected message")
            return
        if not 0 < number < self._count or number in self._peers:
            taken = "there is one already" if number in self._peers else f"expected 1 to {self._count - 1}"
            peer.send(refused=f"server.node_rank: {number}, but {taken}")
            peer.close()
        elif differs := differences(facts, others, name):
            problem = "; ".join(differs)
            peer.send(refused=f"{KEY}: {problem}")
            peer.close()
            say(f"meeting: {peer.name} was rejected: {problem}")
            self._different.setdefault(number, (problem, time.monotonic()))
        else:
            peer.name = name
            self._peers[number] = peer


def _join(plan: LaunchPlan) -> Peer:
    """On another host: find host 0, and wait until it admits this one."""
    facts, deadline = facts_of(plan), time.monotonic() + float(plan.config["server"]["start_timeout_s"])
    peer = Peer(_with_names(lambda: _connect(plan, deadline), deadline), "host 0")
    try:
        own = {"host": int(plan.value("server.node_rank")), "name": socket.gethostname(), "facts": facts}
        peer.introduce(_secret(plan), GREETING_S, **own)
        _wait_let_in(plan, peer, deadline)
    except HandshakeFailed as failure:
        peer.close()
        problem = f"host 0 at {_place(plan)}: {failure}"
        fix = "Start the same config on all hosts, with the same keys, and check server.rendezvous."
        raise ServerDidNotStart(KEY, problem, fix) from failure
    except BaseException:
        peer.close()
        raise
    return peer


def _wait_let_in(plan: LaunchPlan, peer: Peer, deadline: float) -> None:
    while time.monotonic() < deadline:
        said = _heard(plan, peer)
        if said.get("go"):
            return
        if said:
            problem = printable(str(said.get("refused") or said.get("ended") or said)[:1000])
            fix = "Give both the same versions, files and arguments, and start both again."
            raise ServerDidNotStart(KEY, f"host 0 says: {problem}", fix)
        say("waiting for the other hosts")
    problem = f"host 0 at {_place(plan)} did not start in time"
    raise ServerDidNotStart(KEY, problem, "Its log says what it waits for.")


def _heard(plan: LaunchPlan, peer: Peer) -> dict[str, Any]:
    """Host 0's next message; empty if there is none for a while."""
    try:
        return peer.receive(TOLD_S)
    except TimeoutError:
        return {}
    except (OSError, ValueError) as failure:
        problem = f"host 0 at {_place(plan)} ended: {failure}"
        raise ServerDidNotStart(KEY, problem, "Its log says why.") from failure


def _connect(plan: LaunchPlan, deadline: float) -> socket.socket:
    told_at = time.monotonic()
    while True:
        try:
            return socket.create_connection(_address(plan), timeout=TOLD_S)
        except socket.gaierror:
            raise
        except OSError as failure:
            if time.monotonic() > deadline:
                problem = f"host 0 does not listen at {_place(plan)} ({failure.strerror or failure})"
                fix = "Start the same command there with server.node_rank=0, or correct server.rendezvous."
                raise ServerDidNotStart("server.rendezvous", problem, fix) from failure
        if time.monotonic() - told_at > TOLD_S:
            told_at = time.monotonic()
            say(f"waiting for host 0 at {_place(plan)}")
        time.sleep(RETRY_S)
