"""What holds for all tests: which of them run, in which order, and how many cases hypothesis tries."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings

CALM = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("same", max_examples=250, derandomize=True, deadline=None, suppress_health_check=CALM)
settings.register_profile("hour", max_examples=180_000, deadline=None, suppress_health_check=CALM)
settings.load_profile("same")  # --hypothesis-profile=hour is loaded later

# A script's background jobs ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked nightly are left out, and files that start servers come first: they take the longest, and a worker
    that begins one when the others have finished keeps them waiting."""
    kept = [item for item in items if config.getoption("nightly") or not item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    starting = {item.path for item in kept if item.get_closest_marker("server")}
    items[:] = sorted(kept, key=lambda item: item.path not in starting)
