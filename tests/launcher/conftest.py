"""kt-launch called as from a shell, and the tiny checkpoint and adapter it is called with."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

from kt_launch.cli import main


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deepseek_v2 checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on all routed experts of that checkpoint."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "west")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests quantize or digest is not found by others, and not left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KT_LAUNCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Ended:
    """How a call of kt-launch ended."""

    code: int
    out: str
    err: str

    @property
    def plan(self) -> dict[str, Any]:
        """What format=json printed."""
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content

    def value(self, key: str) -> Any:
        return self.plan["resolved"][key]["value"]

    def source(self, key: str) -> str:
        return str(self.plan["resolved"][key]["source"])


Launch = Callable[..., Ended]


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """Calls kt-launch in an empty folder, without the caller's own KT_LAUNCH_ variables."""
    for name in ("MODELS", "LORAS", "CONFIG_DIR"):
        monkeypatch.delenv(f"KT_LAUNCH_{name}", raising=False)
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(tmp_path / "runs"))
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)

    def call(*argv: str) -> Ended:
        code = main(list(argv))
        captured = capfd.readouterr()
        assert list(working.iterdir()) == [], "kt-launch wrote into the working folder"
        return Ended(code, captured.out, captured.err)

    return call


@pytest.fixture
def plan(launch: Launch, checkpoint: Path) -> Launch:
    """Plans a launch of the tiny checkpoint on the CPU."""

    def call(*overrides: str) -> Ended:
        own = ("action=plan", "format=json", "server.device=cpu", "model=auto", f"model.path={checkpoint}")
        return launch(*own, *overrides)

    return call


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
