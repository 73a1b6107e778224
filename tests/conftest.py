"""What holds for all tests: which of them run, in which order and where, and how many cases hypothesis tries."""

from __future__ import annotations

import gc
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

gc.disable()  # while files are collected, which imports torch and transformers

CALM = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("same", max_examples=250, derandomize=True, deadline=None, suppress_health_check=CALM)
settings.register_profile("hour", max_examples=180_000, deadline=None, suppress_health_check=CALM)
settings.load_profile("same")  # --hypothesis-profile=hour is loaded later

# A script's background jobs ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well")


LONG = (
    "tests/bench/test_engines.py",
    "tests/benchmarks/test_bench.py",
    "tests/cluster/test_router.py",
    "tests/kernels/test_scheduling.py",
    "tests/launcher/test_hostile_files.py",
    "tests/operations/test_liveness.py",
    "tests/operations/test_living.py",
    "tests/plugin/test_unwritten_weights.py",
    "tests/proving/test_float32_run.py",
)
"""Half a minute and more with few tests."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked nightly are left out. Files that start servers come first, then those of LONG, then those of many
    tests: they take the longest, and a worker that begins one when the others have finished keeps them waiting."""
    kept = [item for item in items if config.getoption("nightly") or not item.get_closest_marker("nightly")]
    wanted = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    starting = {item.path for item in kept if item.get_closest_marker("server")}
    long, tests = {config.rootpath / file for file in LONG}, Counter(item.path for item in kept)
    items[:] = sorted(
        kept, key=lambda item: (item.path not in starting, item.path not in long, -tests[item.path], item.path)
    )


def pytest_collection_finish() -> None:
    """What is there by now stays."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each worker begins with an empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KT_LAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_variables() -> Iterator[None]:
    """What a command that is called here sets, as keys that were typed or the file of --config, is not set for the next
    test."""
    before = _own_variables()
    yield
    for name in _own_variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _own_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("KT_LAUNCH_")}


PARTS = {"tests/kernels/test_product.py": re.compile(r"\d+x\d+(?=\]$)")}
"""Files that several workers share: what of a test's name tells the parts apart, each with references of its own."""

IN_PROCESS = re.compile(r"tests/(plugin/|edge/test_(limits|tables)|launcher/test_(conflicts|presets)|weights/test_odd)")
"""Files that import SGLang into the tests' own process, which takes five seconds: one worker has all of them."""


class Files(LoadFileScheduling):  # type: ignore[misc]
    """A file's tests stay together, so that they share its server, but for those of PARTS and IN_PROCESS."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        if IN_PROCESS.match(file):
            return IN_PROCESS.pattern
        part = PARTS[file].search(nodeid) if file in PARTS else None
        return f"{file} {part[0]}" if part else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return Files(config, log) if config.getvalue("dist") == "loadfile" else None
