"""How the launcher talks to the server of a plan: its address, and the key that it may demand."""

from __future__ import annotations

import httpx

from kt_model.errors import LaunchError
from kt_model.plan import LaunchPlan
from kt_model.redaction import show_arguments

EVERYWHERE = ("0.0.0.0", "::", "")


def connect(plan: LaunchPlan, timeout_s: float) -> httpx.Client:
    """A client for the server of this plan, which need not run yet."""
    return httpx.Client(
        base_url=server_url(plan), timeout=timeout_s, trust_env=False, headers=authorization(list(plan.argv))
    )


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
