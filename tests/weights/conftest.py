"""kt-launch called as from a shell, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from weight_files import Ended

from kt_launch.cli import main


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def launch(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Calls it to its end."""
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(cache))
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(tmp_path / "runs"))

    def call(*overrides: str) -> Ended:
        capfd.readouterr()
        code = main(list(overrides))
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return call
