"""Ports to listen on: whether one is free, which processes listen on it, and how launches on this machine avoid each
other's ports from planning on, before anybody listens.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import random
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_launch.machine.kernel import read_text
from kt_model.errors import LaunchError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
LISTENING = "0A"
"""A state in /proc/net/tcp."""
ATTEMPTS = 8
"""Attempts to find a free port that no other launch has chosen."""
OWN_PORTS = range(12000, 22000)
"""Free ports are taken from these, as long as the kernel gives none of them to others that ask it for any port: a
server listens many seconds after its port was chosen. SGLang takes its own from 22000 on."""
NAMED_S, NAME_POLL_S = 2.0, 0.02
"""How long a launch that holds a port may take to name its process, and the interval at which that is looked for."""


@dataclass(frozen=True)
class Port:
    """A port to listen on: whether it is free, and who has it if not."""

    number: int
    free: bool
    owner: str = ""
    """The process that has it, or the system's reason."""
    bad_host: bool = False
    """Whether no port of that address can be listened on."""


def probe_port(host: str, wanted: int) -> Port:
    """The wanted port, with its owner if it is taken; for 0, one that is free now and reserved by no launch."""
    found = _probe(host, wanted) if wanted else _find_free(host)
    for _ in range(ATTEMPTS):
        holder = launch_on(host, found.number) if found.free else ""
        if not holder:
            break
        found = Port(wanted, False, holder) if wanted else _find_free(host)
    return found


def _find_free(host: str) -> Port:
    """A port that nobody listens on and that the kernel gives to nobody meanwhile; else one that the kernel gives."""
    low, high = _given_by_kernel()
    if high < OWN_PORTS.start or low >= OWN_PORTS.stop:
        for number in random.SystemRandom().sample(OWN_PORTS, ATTEMPTS):
            if (found := _probe(host, number)).free:
                return found
    return _probe(host, 0)


def _given_by_kernel() -> tuple[int, int]:
    """The first and last port that it gives to connections and to listeners that name none."""
    fields = read_text(Path("/proc/sys/net/ipv4/ip_local_port_range")).split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 else (0, 65535)


def _probe(host: str, wanted: int) -> Port:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as failure:
            bad_host = isinstance(failure, socket.gaierror) or failure.errno == errno.EADDRNOTAVAIL
            reason = "" if bad_host else port_owner(wanted)
            return Port(wanted, False, reason or failure.strerror or str(failure), bad_host)
        return Port(int(probe.getsockname()[1]), True)


def port_owner(port: int) -> str:
    """The process that listens on a port, as far as this user can see it."""
    import psutil

    try:
        listening = [
            c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr and c.laddr.port == port
        ]
        for connection in listening:
            if connection.pid:
                return _shown(connection.pid)
    except psutil.Error:
        pass
    return "a process of another user" if listening_unseen(port) else ""


def listening_unseen(port: int) -> bool:
    """Whether something answers on the port although no visible process listens on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _shown(pid: int) -> str:
    import psutil

    try:
        return f"process {pid} ({' '.join(psutil.Process(pid).cmdline())[:80]})"
    except psutil.Error:
        return f"process {pid}"


def listens(pids: Iterable[int], host: str, port: int) -> bool | None:
    """Whether one of these processes is what listens there. None if unknown: no listener is visible (as in another
    network namespace), or a process's open files may not be inspected."""
    wanted = _listening_sockets(host, port)
    own: set[str] = set()
    hidden = False
    for pid in pids:
        try:
            own |= set(_sockets_of(pid))
        except FileNotFoundError:
            continue  # it has ended
        except OSError:
            hidden = True
    if wanted and wanted <= own:
        return True
    return None if hidden or not wanted else False


def _sockets_of(pid: int) -> Iterator[str]:
    """Inodes of the process's sockets."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (match := re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))) is not None:
                yield match[1]


def _listening_sockets(host: str, port: int) -> set[str]:
    """Inodes of the sockets that a local client reaches: on the exact address, else on all addresses of its family,
    else on all of both families."""
    asked = _reachable(host)
    found: dict[Address, set[str]] = {}
    for name in ("tcp", "tcp6"):
        for line in read_text(Path("/proc/net", name)).splitlines()[1:]:
            fields = line.split()
            address, _, number = fields[1].partition(":")
            if fields[3] == LISTENING and int(number, 16) == port:
                found.setdefault(_address_of(address), set()).add(fields[9])
    everywhere = ipaddress.ip_address("0.0.0.0" if asked.version == 4 else "::")
    return next((found[each] for each in (asked, everywhere, ipaddress.ip_address("::")) if each in found), set())


def _address_of(digits: str) -> Address:
    """An address in /proc/net/tcp, in 32-bit words of the machine's byte order."""
    words = (bytes.fromhex(digits[start : start + 8]) for start in range(0, len(digits), 8))
    found = ipaddress.ip_address(b"".join(word[::-1] if sys.byteorder == "little" else word for word in words))
    return getattr(found, "ipv4_mapped", None) or found


def _resolved(host: str) -> Address:
    """The first address of a name, or of what stands for all addresses. Raises OSError."""
    found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)[0][4][0]
    return ipaddress.ip_address(str(found).partition("%")[0])


def _reachable(host: str) -> Address:
    """The address at which this machine reaches it."""
    address = _resolved(host)
    return ipaddress.ip_address("127.0.0.1") if address.is_unspecified else address


@contextlib.contextmanager
def held_ports(host: str, ports: Mapping[str, int | None]) -> Iterator[None]:
    """Reserves these ports within the block, so that no other launch on this machine proceeds with them and starts a
    server in vain. ports: by the key that set them; None and 0 are ignored.

    The reservations are abstract socket names, which belong to a network namespace as ports do, and which the kernel
    releases when a process ends in any way. Raises LaunchError naming who holds one. Of two simultaneous launches on
    overlapping addresses, both may have to start again.
    """
    with contextlib.ExitStack() as held:
        for key, port in ports.items():
            if port:
                held.enter_context(_held_port(key, host, port))
        yield


@contextlib.contextmanager
def _held_port(key: str, host: str, port: int) -> Iterator[None]:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as by,
    ):
        try:
            name = f"\0kt-launch/{port}/{_resolved(host)}"
            own.bind(name)
            by.bind(f"{name}/{os.getpid()}")
            holder = launch_on(host, port)
        except OSError as failure:  # where names are refused, the number of the start still tells servers apart
            taken = failure.errno == errno.EADDRINUSE
            holder = _wait_for_name(host, port, name) or "another launch of kt-launch has it" if taken else ""
        if holder:
            fix = f"Stop it, or set {key}=0 for a free port."
            raise LaunchError(key, f"{port} on {host} cannot be used: {holder}", fix)
        yield


def _wait_for_name(host: str, port: int, name: str) -> str:
    """launch_on for a port whose `name` is taken: who has taken it names its process a moment later."""
    deadline = time.monotonic() + NAMED_S
    while not (holder := launch_on(host, port)) and time.monotonic() < deadline:
        if f"@{name[1:]}/{os.getpid()}\n" in read_text(Path("/proc/net/unix")):
            break  # this process itself
        time.sleep(NAME_POLL_S)
    return holder


def launch_on(host: str, port: int) -> str:
    """The other launch that has reserved a port on that address, or on one that contains it; '' for none."""
    with contextlib.suppress(OSError):
        own = _resolved(host)
        for held, pid in re.findall(rf"@kt-launch/{port}/([^/\s]+)/(\d+)$", read_text(Path("/proc/net/unix")), re.M):
            other = ipaddress.ip_address(held)
            if int(pid) != os.getpid() and (own == other or own.is_unspecified or other.is_unspecified):
                return f"{_shown(int(pid))} has it for its server"
    return ""
