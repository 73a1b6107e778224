"""Servers that several tests share; each start costs half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Running, launched


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo model and its adapter, started by the bare command; beside its runs a folder for temporary files."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "tmp").mkdir()
    with launched(runs=runs, env={"TMPDIR": str(runs / "tmp")}) as running:
        yield running


@pytest.fixture(scope="session")
def adapters() -> Path:
    """Folder of the committed PEFT adapters: <family>/<name>."""
    return Path(__file__).parent.parent / "fixtures" / "adapters"
