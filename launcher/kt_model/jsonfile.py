"""JSON files: reading required ones, with errors in the user's words, and optional ones; writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_model.atomic_file import MOST_BYTES, read_regular, whole_file
from kt_model.errors import LaunchError

if TYPE_CHECKING:
    from pydantic import ValidationError


def read_json(path: Path, where: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON object from a file that must exist."""
    try:
        content = json.loads(read_regular(path, most_bytes).decode())
    except FileNotFoundError as failure:
        raise LaunchError(where, f"{path.parent} has no {path.name}", "Choose a folder that has one.") from failure
    except (OSError, ValueError, RecursionError) as failure:
        raise LaunchError(where, f"{path} is not readable JSON", "Download the file again.") from failure
    if not isinstance(content, dict):
        raise LaunchError(where, f"{path} holds no JSON object", "Download the file again.")
    return content


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing, damaged, or holds something else."""
    try:
        content = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Any, *, private: bool = False) -> None:
    """Atomically; `private`: readable by its owner only. Raises OSError."""
    with whole_file(path, private=private) as file:
        file.write(json.dumps(content, indent=1).encode())


def first_mistake(failure: ValidationError) -> str:
    """Where and how a JSON file violates its model; empty if it is not JSON at all."""
    first = failure.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ""
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
