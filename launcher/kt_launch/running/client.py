"""How the launcher talks to the server of a plan: its address, and the key that it may demand."""

from __future__ import annotations

import httpx

from kt_model.contract import START_HEADER
from kt_model.errors import LaunchError, ServerDidNotStart
from kt_model.plan import LaunchPlan
from kt_model.redaction import show_arguments

EVERYWHERE = ("0.0.0.0", "::", "")


def connect(plan: LaunchPlan, timeout_s: float) -> httpx.Client:
    """A client for the server of this plan, which need not run yet."""
    return httpx.Client(
        base_url=server_url(plan), timeout=timeout_s, trust_env=False, headers=authorization(list(plan.argv))
    )


def connect_to_start(plan: LaunchPlan, timeout_s: float, start: str) -> httpx.Client:
    """A client for one start of the server, whose number is `start`. Its requests raise ServerDidNotStart when
    another process answers: SGLang says that it is ready also where its port belongs to somebody else."""
    client = connect(plan, timeout_s)

    def require_start(response: httpx.Response) -> None:
        if response.headers.get(START_HEADER) != start:
            problem = f"another server than the one that was started here answers on {server_url(plan)}"
            raise ServerDidNotStart("server.port", problem, "Choose a free port, or stop that server.")

    client.event_hooks = {"response": [require_start]}
    return client


def server_url(plan: LaunchPlan) -> str:
    """Where the server can be reached from this machine."""
    return url_of(plan.value("server.host"), plan.value("server.port"))


def url_of(host: str, port: int) -> str:
    """The address of something that listens on host and port here."""
    reachable = "127.0.0.1" if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{reachable}:{port}"


def authorization(argv: list[str]) -> dict[str, str]:
    """The header that a server with an API key demands; {} without one. Raises LaunchError where the key is not set."""
    try:
        words = show_arguments(argv)
    except KeyError as missing:
        problem = f"it refers to the environment variable {missing.args[0]}, which is not set"
        raise LaunchError("server.extra_args", problem, f"Set {missing.args[0]} and start again.") from missing
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--api-key":
            return {"Authorization": f"Bearer {following}"}
        if word.startswith("--api-key="):
            return {"Authorization": f"Bearer {word.partition('=')[2]}"}
    return {}
