"""kt-launch: what a user may write, what it resolves to, and what is started. `from kt_launch import Server, plan` is
the launcher from Python (api.py), imported when it is first used: importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kt_launch.api import LaunchError, LaunchErrors, LaunchPlan, ProofFailed, Server, ServerDidNotStart, plan

__all__ = ["LaunchError", "LaunchErrors", "LaunchPlan", "ProofFailed", "Server", "ServerDidNotStart", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("kt_launch.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
