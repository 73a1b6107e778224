"""The run that this server belongs to: its state according to the launcher, and the adapters that the next start must
reload.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from kt_model.atomic_file import read_regular
from kt_model.contract import ADAPTERS_FILE, RUN_FOLDER, STATE_FILE
from kt_model.jsonfile import write_json

UNKNOWN = "unknown"
log = logging.getLogger(__name__)


def state() -> str | None:
    """The launcher's state of the run; None without a launcher."""
    folder = os.environ.get(RUN_FOLDER)
    if folder is None:
        return None
    try:
        return str(json.loads(read_regular(Path(folder) / STATE_FILE))["state"])
    except (OSError, ValueError, TypeError, KeyError):
        return UNKNOWN


def remember_adapters(paths: Mapping[str, str]) -> None:
    """paths: of all adapters that requests can name, by name. A failed write is logged."""
    if folder := os.environ.get(RUN_FOLDER):
        try:
            write_json(Path(folder) / ADAPTERS_FILE, dict(paths))
        except OSError as failure:
            log.warning("%s cannot be written (%s): a restart will not load what was loaded", ADAPTERS_FILE, failure)
