"""Reads a JSON file that must be there, with errors in the user's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file that must be there."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as failure:
        raise LaunchError(where, f"{path.parent} has no {path.name}", "Name a folder that has one.") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise LaunchError(
            where, f"{path} is not readable JSON", "Get the file again from where it came from."
        ) from failure
    if not isinstance(content, dict):
        raise LaunchError(where, f"{path} holds no JSON object", "Get the file again from where it came from.")
    return content
