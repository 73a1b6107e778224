"""Our loggers speak in every test: SGLang, once it has set up logging in this process, silences those unknown to it."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def audible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loggers of the plugin as they are before anybody has set up logging."""
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith("kt_sglang") and isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "disabled", False)
            monkeypatch.setattr(logger, "propagate", True)
