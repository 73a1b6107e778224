"""The launcher's HTTP client for a plan's server: its address, and the keys that it may require."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property

import httpx

from kt_model.contract import OWN_ADMIN_KEY, START_HEADER
from kt_model.errors import LaunchError, ServerDidNotStart
from kt_model.flags import flags_in
from kt_model.plan import LaunchPlan
from kt_model.redaction import REFERENCE, show_arguments

EVERYWHERE = ("0.0.0.0", "::", "")
LOADING, UNLOADING = "/load_lora_adapter", "/unload_lora_adapter"
PROXY = re.compile(r"(?:https?|all)_proxy", re.IGNORECASE)
BYPASSES = ("no_proxy", "NO_PROXY")
ADMIN_ROUTES = ("/flush_cache", LOADING, UNLOADING)
"""Of the routes that the launcher uses, those that change the server."""
ALONE = httpx.Limits(max_keepalive_connections=0)
"""Each request has a connection of its own. One that is kept may be closed by the server just as it is used again, and
that request is lost: uvicorn closes it after 5 s without a request, as httpx does, and SGLang's router closes it after
it has refused a request before it had its body."""


def connect(plan: LaunchPlan, timeout_s: float) -> httpx.Client:
    """A client for this plan's server, which need not be running yet."""
    url, keys = server_url(plan), Keys(list(plan.argv))
    return httpx.Client(base_url=url, timeout=timeout_s, trust_env=False, auth=keys, limits=ALONE)


def connect_to_start(plan: LaunchPlan, timeout_s: float, start: str) -> httpx.Client:
    """A client for one start of the server, numbered `start`. Its requests raise ServerDidNotStart if another process
    answers: SGLang reports that it is ready even if another server owns its port."""
    client = connect(plan, timeout_s)

    def require_start(response: httpx.Response) -> None:
        if response.headers.get(START_HEADER) != start:
            raise another_answers(server_url(plan))

    client.event_hooks = {"response": [require_start]}
    return client


def another_answers(url: str, owner: str = "") -> ServerDidNotStart:
    """owner: whom the machine names for the port, if it does."""
    problem = f"a server other than the one started here answers on {url}{f': {owner}' if owner else ''}"
    return ServerDidNotStart("server.port", problem, "Choose a free port, or stop that server.")


def server_url(plan: LaunchPlan) -> str:
    """The server's address, as reachable from this machine."""
    return url_of(plan.value("server.host"), plan.value("server.port"))


def url_of(host: str, port: int) -> str:
    """The address of a server listening on this host and port."""
    reachable = "127.0.0.1" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{reachable}:{port}"


def without_proxy(environ: Mapping[str, str], urls: Sequence[str]) -> dict[str, str]:
    """Variables with which a child process reaches these addresses and this machine directly, also where the
    environment names a proxy for all others: SGLang, its router and its benchmark ask their servers through it."""
    if not any(PROXY.fullmatch(name) and environ[name] for name in environ):
        return {}
    known = [host for name in BYPASSES for host in environ.get(name, "").split(",")]
    own = ["localhost", "127.0.0.1", "::1", *(httpx.URL(url).host for url in urls)]
    direct = ",".join(dict.fromkeys(host.strip() for host in [*known, *own] if host.strip()))
    return dict.fromkeys(BYPASSES, direct)


class Keys(httpx.Auth):
    """The keys that a command's server requires; the admin key is read once it is needed. Raises LaunchError if one
    cannot be read."""

    def __init__(self, argv: list[str]) -> None:
        _make_own_key(argv)
        self._argv = argv
        self.key = _read(argv, "--api-key")

    @cached_property
    def admin_key(self) -> str | None:
        return _read(self._argv, "--admin-api-key")

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        key = self.admin_key if request.url.path in ADMIN_ROUTES and self.admin_key else self.key
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        yield request


def shared_key(argv: Sequence[str]) -> str | None:
    """The key shared by all hosts of one config: the admin key, else the API key; never one that a launcher has made up
    for itself. Raises LaunchError if it cannot be read."""
    words = without_own_key(argv)
    return _read(words, "--admin-api-key") or _read(words, "--api-key")


def without_own_key(argv: Sequence[str]) -> list[str]:
    """The command without the key that its launcher has made up for itself, if there is one."""
    words, own = [*argv], REFERENCE + OWN_ADMIN_KEY
    if own in words:
        del words[words.index(own) - 1 : words.index(own) + 1]
    return words


def keys_at(api_key: str | None, admin_key: str | None = None) -> Keys:
    """The keys that server.api_key and server.admin_key refer to. Raises LaunchError if one cannot be read."""
    places = (("--api-key", api_key), ("--admin-api-key", admin_key))
    return Keys([word for flag, place in places if place for word in (flag, place)])


def _read(argv: Sequence[str], flag: str) -> str | None:
    """The key of one flag. Raises LaunchError if it cannot be read."""
    place = next((value for name, value in flags_in(argv) if name == flag), None)
    return None if place is None else read_keys([flag, place])[1]


def read_keys(argv: list[str]) -> list[str]:
    """The command with references replaced by their keys. Raises LaunchError if one cannot be read."""
    _make_own_key(argv)
    try:
        return show_arguments(argv)
    except KeyError as missing:
        where, name = _setting_of(argv, missing.args[0]), missing.args[0]
        problem = f"a key is said to be in the environment variable {name}, which is not set or empty"
        raise LaunchError(where, problem, f"Set {name} and start again.") from missing
    except OSError as failure:
        problem = f"a key is said to be in {failure.filename}, which cannot be read ({failure.strerror})"
        where = _setting_of(argv, str(failure.filename))
        raise LaunchError(where, problem, "Put it there, readable by you only.") from failure


def _make_own_key(argv: Sequence[str]) -> None:
    """The admin key that a command refers to as its launcher's own is made up, in the environment that the server
    inherits."""
    if REFERENCE + OWN_ADMIN_KEY in argv:
        os.environ.setdefault(OWN_ADMIN_KEY, secrets.token_hex(16))


def _setting_of(argv: Sequence[str], place: str) -> str:
    """The setting that says that a key is in this variable or file."""
    flags = [flag for flag, value in flags_in(argv) if value.endswith(place)]
    return "server.admin_key" if "--admin-api-key" in flags and "--api-key" not in flags else "server.api_key"
