"""The run that this server is of: whether its launcher has proven it, and what the next start has to load again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from kt_model.contract import ADAPTERS_FILE, READY_FILE, RUN_FOLDER
from kt_model.jsonfile import write_json

log = logging.getLogger(__name__)


def proven() -> bool | None:
    """None where no launcher says so of this server."""
    folder = os.environ.get(RUN_FOLDER)
    return (Path(folder) / READY_FILE).exists() if folder else None


def remember_adapters(paths: Mapping[str, str]) -> None:
    """paths: of all adapters that requests can name, by name. A disk that does not take it is told in the log."""
    if folder := os.environ.get(RUN_FOLDER):
        try:
            write_json(Path(folder) / ADAPTERS_FILE, dict(paths))
        except OSError as failure:
            log.warning("%s cannot be written (%s): a restart will not load what was loaded", ADAPTERS_FILE, failure)
