"""Checks a preset's YAML before anything is built from it: a small text file with a bounded number of values.

PyYAML expands aliases: nine lines can become a billion values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kt_model.errors import LaunchError

MOST_BYTES = 1 << 16
MOST_VALUES = 10_000
MOST_DEPTH = 30
FIX = "Fix the file."
OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def read_preset_text(path: Path) -> str:
    """The text of a preset file. Raises LaunchError if it is not text, is too large, or expands too far; what its
    values mean is not checked."""
    if not path.is_file():
        raise LaunchError(str(path), "is not a file", FIX)
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise LaunchError(str(path), f"has more than {MOST_BYTES >> 10} KiB, too many for a preset", FIX)
    try:
        text = content.decode()
    except UnicodeDecodeError as failure:
        raise LaunchError(str(path), f"is not text: byte {failure.start} is not UTF-8", FIX) from failure
    try:
        _require_flat(path, text)
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as failure:
        raise LaunchError(str(path), yaml_problem(failure), FIX) from failure
    if _count(path, node, {}) > MOST_VALUES:
        raise LaunchError(str(path), f"has more than {MOST_VALUES} values, aliases counted, too many for a preset", FIX)
    return text


def yaml_problem(failure: yaml.YAMLError) -> str:
    """Where and how a text violates YAML's grammar."""
    mark = getattr(failure, "problem_mark", None)
    reason = getattr(failure, "problem", None) or getattr(failure, "reason", None)
    return f"invalid YAML{f' at line {mark.line + 1}' if mark else ''}{f': {reason}' if reason else ''}"


def read_preset(path: Path) -> Any:
    """Its content."""
    text = read_preset_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as failure:  # such as the date 2020-13-40
        raise LaunchError(str(path), f"invalid YAML: {str(failure).splitlines()[0]}", FIX) from failure


def validate_preset(path: Path, content: Any) -> None:
    """Raises LaunchError if Hydra would find no keys, or an invalid list of defaults."""
    if content is not None and not isinstance(content, dict):
        raise LaunchError(str(path), "has no keys, but key: value is expected", FIX)
    defaults = (content or {}).get("defaults", [])
    if not isinstance(defaults, list) or not all(map(_is_choice, defaults)):
        problem = "defaults is expected to be a list of names, or of group: name"
        raise LaunchError(str(path), problem, FIX)


def _is_choice(entry: Any) -> bool:
    if isinstance(entry, dict):
        return len(entry) == 1 and all(isinstance(group, str) and _is_option(option) for group, option in entry.items())
    return isinstance(entry, str)


def _is_option(option: Any) -> bool:
    names = option if isinstance(option, list) else [option]
    return option is None or all(isinstance(name, str) for name in names)


def _require_flat(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, OPENING)
        depth -= isinstance(event, CLOSING)
        if depth > MOST_DEPTH:
            raise LaunchError(str(path), f"is nested more than {MOST_DEPTH} deep, too much for a preset", FIX)


def _count(path: Path, node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Values below a node, counting an alias each time it occurs; 0 in `counted` marks nodes that are being counted."""
    if isinstance(node, yaml.CollectionNode):
        if id(node) not in counted:
            counted[id(node)] = 0
            parts = (part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,)))
            counted[id(node)] = 1 + sum(_count(path, part, counted) for part in parts)
        elif counted[id(node)] == 0:
            raise LaunchError(str(path), f"invalid YAML at line {node.start_mark.line + 1}: contains itself", FIX)
        return counted[id(node)]
    return 1
