"""Turns models and adapters as typed (presets and folders, also in a list) into what Hydra composes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from kt_launch.config.folder_presets import PACKAGES, adapter_name, is_folder, option_of
from kt_model.errors import LaunchError
from kt_model.user_paths import expanded

ADAPTER = re.compile(r"\{[^{}]*\}")
ADAPTER_KEYS = ("path", "layout")
"""What an adapter in a list may set besides its name."""
ADAPTER_PART = re.compile(r"""\s*["']?(?P<key>\w+)["']?\s*:\s*(?P<value>'[^']*'|"[^"]*"|[^,'"]*?)\s*(?:,|$)""")
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)$", re.DOTALL)


def write_out_adapters(override: str) -> list[str]:
    """`lora=[chef,{name: west, path: /path/to/folder}]` as a choice of presets plus a path for each other adapter."""
    if not override.startswith("lora=[") or "{" not in override:
        return [override]
    adapters = [_read_adapter(text) for text in ADAPTER.findall(override)]
    rest = ADAPTER.sub("", override.removeprefix("lora=").removeprefix("[").removesuffix("]"))
    others = [_unquoted(word) for word in split_list(rest)]
    names = [adapter["name"] for adapter in adapters] + [adapter_name(word) for word in others if is_folder(word)]
    if twice := _twice(names):
        raise LaunchError("lora", f"two adapters are named {twice}", "Give each its own name.")
    keys = [f"lora.adapters.{one['name']}.{key}={one[key]}" for one in adapters for key in ADAPTER_KEYS if key in one]
    return [f"lora=[{','.join(split_list(rest))}]" if others else "lora=none", *keys]


def _read_adapter(text: str) -> dict[str, str]:
    """One `{name: …, path: …}`, which may also set other keys of an adapter."""
    parts: dict[str, str] = {}
    reached = 1
    while match := ADAPTER_PART.match(text, reached, len(text) - 1):
        parts[match["key"]], reached = match["value"].strip("'\""), match.end()
    read = {"name", "path"} <= parts.keys() <= {"name", *ADAPTER_KEYS} and all(parts.values())
    if not read or reached < len(text) - 1:
        problem = f"{text} cannot be read, expected {{name: <its name>, path: <its folder>}}"
        raise LaunchError("lora", problem, "Set lora=[{name: mine, path: /path/to/folder}] in quotes.")
    if not re.fullmatch(r"[A-Za-z][\w-]*", parts["name"]):
        problem = f"{parts['name']!r} cannot be used in a key; letters, digits, _ and - are expected"
        raise LaunchError("lora", problem, "Give the adapter a plain name.")
    return parts


def write_out_folders(override: str, presets: Callable[[str], Collection[str]], multirun: bool) -> str:
    """`model=/x` and `lora=[west,/y]` as choices of presets. A preset's name takes precedence; with multirun there may
    be several choices. Raises LaunchError if two adapters would have the same name."""
    group, _, value = override.partition("=")
    if group not in PACKAGES or not value or SWEEP_FUNCTION.match(value):
        return override
    several = multirun and "," in value and not expanded(value).exists()
    choices = split_list(value) if several else [value]
    return f"{group}={','.join(_choice(group, choice, presets(group)) for choice in choices)}"


def _choice(group: str, text: str, presets: Collection[str]) -> str:
    if group == "lora" and text.startswith("[") and text.endswith("]"):
        items = [_unquoted(item) for item in split_list(text[1:-1])]
        _require_names_apart([item for item in items if item not in presets and is_folder(item)], items)
        return f"[{','.join(_option(item, presets) for item in items)}]"
    return text if "," in text and not expanded(text).exists() else _option(_unquoted(text), presets)


def _option(text: str, presets: Collection[str]) -> str:
    return option_of(text) if text not in presets and is_folder(text) else text


def _require_names_apart(folders: list[str], items: list[str]) -> None:
    names = [adapter_name(folder) for folder in folders] + [item for item in items if item not in folders]
    if twice := _twice(names):
        two = [folder for folder in folders if adapter_name(folder) == twice]
        fix = f"Name one yourself: {{name: other, path: {two[-1]}}}."
        raise LaunchError("lora", f"two adapters are named {twice}", fix)


def _twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def split_list(text: str) -> list[str]:
    """The items between commas; a comma inside quotes, braces or brackets does not separate (JSON is one item)."""
    items, quote, depth = [""], "", 0
    for letter in text:
        if letter == "," and not quote and depth == 0:
            items.append("")
            continue
        if letter == quote:
            quote = ""
        elif letter in "'\"" and not quote and (depth or not items[-1].strip()):
            quote = letter
        elif not quote:
            depth = max(depth + (letter in "{[") - (letter in "}]"), 0)
        items[-1] += letter
    return [item.strip() for item in items if item.strip()]
