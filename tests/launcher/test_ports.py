"""Ports: free ones, who listens on one, and who holds one before anybody listens."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from kt_launch.machine import ports
from kt_launch.machine.ports import held_ports, launch_on, listens, probe_port
from kt_launch.proving.proof import NOT_SEEN, OF_THIS_START, Proof
from kt_launch.watching.own_port import answering, in_thread
from kt_model.errors import LaunchError

HOLD = """
import sys
from kt_launch.machine.ports import held_ports
with held_ports(sys.argv[1], {"server.port": int(sys.argv[2])}):
    print("held", flush=True)
    input()
"""
HOLD_AND_TELL_LATER = """
import os, socket, sys, time
name = "\\0kt-launch/" + sys.argv[2] + "/" + sys.argv[1]
own, by = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
own.bind(name)
print("held", flush=True)
input()
time.sleep(0.3)
by.bind(name + "/" + str(os.getpid()))
input()
"""
LISTEN = """
import socket, sys
kind = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], int(sys.argv[2])), family=kind) as server:
    print(server.getsockname()[1], flush=True)
    input()
"""


class Nothing(BaseHTTPRequestHandler):
    """Answers 501 to everything."""

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Another process that has said its first word."""
    with contextlib.ExitStack() as stack:

        def started(code: str, host: str, port: int) -> subprocess.Popen[str]:
            command = [sys.executable, "-P", "-c", code, host, str(port)]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe))
            stack.callback(process.kill)
            return process

        yield started


def first_word(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_free_port_can_be_listened_on() -> None:
    port = probe_port("127.0.0.1", 0)
    assert port.free
    with socket.create_server(("127.0.0.1", port.number)):
        assert not probe_port("127.0.0.1", port.number).free


def test_a_free_port_is_none_that_the_kernel_gives_to_others_meanwhile() -> None:
    """A server listens ten seconds after its port was chosen."""
    given = [int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()]
    if given[0] < ports.OWN_PORTS.stop and given[1] >= ports.OWN_PORTS.start:
        pytest.skip(f"here the kernel gives {given}")
    found = {probe_port("127.0.0.1", 0).number for _ in range(50)}
    assert not [number for number in found if given[0] <= number <= given[1]]
    assert len(found) > 25, "others that choose at the same time choose another"


@pytest.mark.parametrize("given", ["1024 65535", "", "15000 22000"])
def test_where_the_kernel_gives_all_of_them_it_is_asked(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "read_text", lambda path: given if path.name == "ip_local_port_range" else "")
    port = probe_port("127.0.0.1", 0)
    assert port.free
    with socket.create_server(("127.0.0.1", port.number)):
        pass


def test_the_owner_of_a_busy_port_is_named(busy_port: int) -> None:
    assert f"process {os.getpid()} (" in probe_port("127.0.0.1", busy_port).owner


def test_a_port_that_a_launch_holds_is_taken_until_that_is_gone(begin: Begin) -> None:
    port = probe_port("127.0.0.1", 0).number
    other = begin(HOLD, "127.0.0.1", port)
    assert first_word(other) == "held"
    found = probe_port("127.0.0.1", port)
    assert (found.free, found.owner.startswith(f"process {other.pid} (")) == (False, True), found
    for host in "127.0.0.1", "localhost", "0.0.0.0":
        with pytest.raises(LaunchError) as refused, held_ports(host, {"server.port": port}):
            pass
        problem = f"{port} on {host} cannot be used: process {other.pid} ("
        assert (refused.value.where, refused.value.problem.startswith(problem)) == ("server.port", True)
        assert refused.value.fix == "Stop it, or set server.port=0 for a free port."
    assert launch_on("127.0.0.2", port) == "", "another address of this machine"
    with held_ports("127.0.0.1", {"server.metrics_port": None, "server.adapters_port": 0}):
        assert probe_port("127.0.0.1", 0).number != port
    other.kill()
    other.wait(timeout=300)
    with held_ports("127.0.0.1", {"server.port": port}):
        assert probe_port("127.0.0.1", port).free, "for this process, which is the one that holds it"


def test_who_has_just_taken_a_port_is_waited_for_to_be_named(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two names are two system calls, between which a busy machine may do much else."""
    monkeypatch.setattr(ports, "NAMED_S", 60.0)
    port = probe_port("127.0.0.1", 0).number
    other = begin(HOLD_AND_TELL_LATER, "127.0.0.1", port)
    assert first_word(other) == "held" and other.stdin is not None
    print(file=other.stdin, flush=True)
    with (
        pytest.raises(LaunchError, match=f"cannot be used: process {other.pid} "),
        held_ports("127.0.0.1", {"a": port}),
    ):
        pass


def test_one_port_is_not_held_twice_by_a_process_either() -> None:
    port = probe_port("127.0.0.1", 0).number
    own = {"server.port": port, "server.adapters_port": port}
    told = rf"server.adapters_port: {port} on .* another launch"
    with pytest.raises(LaunchError, match=told), held_ports("127.0.0.1", own):
        pass
    with held_ports("127.0.0.1", {"server.port": port}):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", *(["::1", "::"] if has_ipv6() else [])])
def test_who_listens_is_known_by_the_socket(begin: Begin, host: str) -> None:
    address = "127.0.0.1" if host == "localhost" else host
    server = begin(LISTEN, address, 0)
    port = int(first_word(server))
    assert listens([server.pid], host, port) is True
    assert listens([os.getpid(), server.pid], host, port) is True
    assert listens([os.getpid()], host, port) is False
    server.kill()
    server.wait(timeout=300)
    assert listens([os.getpid(), server.pid], host, port) is None, "nobody listens"


def test_a_stranger_on_another_address_is_no_stranger(begin: Begin) -> None:
    """Who asks 127.0.0.1 does not reach it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert first_word(begin(LISTEN, "127.0.0.2", port)) == str(port)
        assert listens([os.getpid()], "127.0.0.1", port) is True
        assert listens([os.getpid()], "127.0.0.2", port) is False


def test_a_process_that_shares_the_port_is_a_stranger(begin: Begin) -> None:
    """Whom of the two a request reaches, the kernel decides."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        other = begin(LISTEN.replace("family=kind", "reuse_port=True"), "127.0.0.1", port)
        assert first_word(other) == str(port)
        assert listens([os.getpid()], "127.0.0.1", port) is False
        assert listens([os.getpid(), other.pid], "127.0.0.1", port) is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_has_open_is_not_guessed(busy_port: int) -> None:
    root = os.getpid()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(54322)
        os.setuid(54322)
        os._exit(0 if listens([root], "127.0.0.1", busy_port) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_server_of_the_launchers_own_answers_until_the_block_ends(busy_port: int) -> None:
    begun = in_thread(HTTPServer(("127.0.0.1", 0), Nothing))
    with answering("server.x_port", "127.0.0.1", 0, lambda: begun) as server:
        assert httpx.get(f"http://127.0.0.1:{server.server_port}/", trust_env=False, timeout=60).status_code == 501
    assert not begun[1].is_alive() and server.fileno() == -1
    told = rf"^server\.x_port: {busy_port} on 127\.0\.0\.1 cannot be used: .+ Set server\.x_port=0 for a free port\.$"
    taken = answering("server.x_port", "127.0.0.1", busy_port, lambda: in_thread(HTTPServer(("", busy_port), Nothing)))
    with pytest.raises(LaunchError, match=told), taken:
        pass


def test_where_it_cannot_be_seen_who_listens_the_proof_says_so_and_on_what_it_stands() -> None:
    facts = {"layers": 1, "experts_a_layer": 4, "isa": "avx2", "method": "AMXBF16_SFT", "replicas": 1, "schedulers": 1}
    found = Proof(**facts, computing=1, noise=0.0, listener=f"{NOT_SEEN} http://127.0.0.1:1")  # type: ignore[arg-type]
    told = "not seen from here which process listens on http://127.0.0.1:1; its answers bear the number of this start"
    assert found.lines().count(told) == 1
    assert len(replace(found, listener=OF_THIS_START).lines()) == len(found.lines()) - 1
