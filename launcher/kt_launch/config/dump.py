"""Saves a config to a file and reads it back: what differs from the defaults, each value with its source.

The file is YAML (or JSON) with the schema's keys. When read, it stands for overrides typed before all others, on top of
no preset. The action is always typed, so a file's `action` is ignored both ways.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kt_launch.config.schema import Config, in_dictionary, is_open, read_fields
from kt_model.errors import LaunchError, quoted, shown
from kt_model.printable import printable
from kt_model.redaction import FILE_REFERENCE

MADE_WITH = "made_with"
"""What a resolved config was made from: versions, and file digests by `<what the folder is>/<name>`."""
LEFT_OUT = ("action", "config", "format", MADE_WITH)
PLAN_PARTS = {"config", "resolved", "argv"}
"""What plan.json of a run folder has at its top, and a config has not."""
BARE = {"model": "auto", "lora": "none"}
"""The presets below a file: none of ours."""
PATHS = (
    *("kt.weight_path", "kt.expert_profile", "kt.record_experts", "lora.allow"),
    *("paths.models", "paths.loras", "paths.runs", "sweep.folder"),
)
"""Keys of files and folders, beside those that end in path."""
KEYS = ("server.api_key", "server.admin_key")
"""Keys that may refer to a file."""
FILE_VARIABLE = "KT_LAUNCH_CONFIG_FILE"
"""Set to the file's path, so that each job of a sweep can tell which values came from it."""

Tree = dict[str, Any]


def kept_values(config: Config, full: bool = False) -> dict[str, Any]:
    """Key -> JSON value, for all keys or for those that differ from the defaults."""
    now, default = dict(leaves(config.model_dump(mode="json"))), dict(leaves(Config().model_dump(mode="json")))
    names = [key for key in now if key.partition(".")[0] not in LEFT_OUT]
    names = [key for key in names if not (in_dictionary(key) and now[key] is None)]
    return {key: now[key] for key in names if full or key not in default or now[key] != default[key]}


def write_yaml(values: Mapping[str, Any], source: Callable[[str], str], notes: list[str]) -> str:
    """Values by dotted key as nested YAML, each with its source; notes come first, as comments."""
    lines = [f"# {printable(note)}" for note in notes]
    open_at: list[str] = []
    for key, value in values.items():
        *parents, name = key.split(".")
        shared = next((at for at, pair in enumerate(zip(parents, open_at, strict=False)) if pair[0] != pair[1]), None)
        begin = min(len(parents), len(open_at)) if shared is None else shared
        lines += [f"{'  ' * depth}{_name(parents[depth])}:" for depth in range(begin, len(parents))]
        open_at = parents
        said = printable(source(key))
        lines.append(f"{'  ' * len(parents)}{_name(name)}: {json.dumps(value, ensure_ascii=False)}  # {said}")
    return "\n".join(lines) + "\n"


def write_made_with(stood_on: Mapping[str, Mapping[str, str]]) -> str:
    """The section of versions and digests."""
    sections = [(name, json.dumps(dict(values), indent=4, ensure_ascii=False)) for name, values in stood_on.items()]
    return "\n".join([f"{MADE_WITH}:", *(f"  {name}: {text[:-1]}  }}" for name, text in sections)]) + "\n"


def read_made_with(file: Path) -> dict[str, dict[str, str]]:
    """That section of a file, as far as it is valid. Raises LaunchError."""
    found = _read(file).get(MADE_WITH)
    sections = found if isinstance(found, dict) else {}
    valid = {name: values for name, values in sections.items() if isinstance(values, dict)}
    return {name: {str(key): str(value) for key, value in values.items()} for name, values in valid.items()}


def changed(base: Config, top: Config, typed: list[str]) -> Config:
    """`base` with the typed parts of `top`: single keys, and whole sections whose preset was chosen."""
    tree, other = base.model_dump(mode="json"), top.model_dump(mode="json")
    for word in typed:
        *parents, name = word.lstrip("+~").partition("=")[0].split(".")
        inner, source = tree, other
        for parent in parents:
            inner, source = inner.setdefault(parent, {}), source.get(parent, {})
        if name in source:
            inner[name] = source[name]
    return Config.model_validate(tree)


def _name(name: str) -> str:
    """Quoted if YAML would read it as something else, such as an adapter named on."""
    import yaml

    return name if yaml.safe_load(name) == name else json.dumps(name)


def nested(values: Mapping[str, Any]) -> Tree:
    """Dotted keys as a tree."""
    tree: Tree = {}
    for key, value in values.items():
        *parents, name = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return tree


def read_overrides(file: Path, typed: list[str]) -> list[str]:
    """The file as Hydra overrides, without what the typed choices of presets replace. Raises LaunchError."""
    chosen = {word.partition("=")[0] for word in typed}
    values = {key: value for key, value in read_values(file).items() if key.partition(".")[0] not in chosen}
    presets = [f"{group}={preset}" for group, preset in BARE.items() if group not in chosen]
    return [*presets, *(hydra_override(key, value) for key, value in values.items())]


def read_values(file: Path) -> dict[str, Any]:
    """Dotted key -> value of a file, whose relative paths start at its own folder. Raises LaunchError."""
    kept = [(key, value) for key, value in leaves(_read(file)) if key.partition(".")[0] not in LEFT_OUT]
    return {key: anchored(key, value, file.parent) for key, value in kept}


def anchored(key: str, value: Any, folder: Path) -> Any:
    """The value, if it is a relative path, or a list of them, seen from `folder`. What begins with ~ stays as it is, so
    that it means the home of whoever starts from it."""
    if isinstance(value, list):
        return [anchored(key, each, folder) for each in value]
    if key in KEYS and isinstance(value, str) and value.startswith(FILE_REFERENCE):
        return FILE_REFERENCE + _anchored_path(value.removeprefix(FILE_REFERENCE), folder)
    if not is_path(key) or not isinstance(value, str):
        return value
    return _anchored_path(value, folder)


def _anchored_path(path: str, folder: Path) -> str:
    stays = not path.strip() or path.startswith(("~", "/", "$"))
    return path if stays else os.path.normpath(folder / path)


def is_path(key: str) -> bool:
    """Whether a key's values are files or folders."""
    return key in PATHS or key.rpartition(".")[2] == "path"


def _read(file: Path) -> Tree:
    from kt_launch.config.presetfile import read_preset

    fix = "kt-launch config writes one."
    if file.is_dir():
        raise LaunchError("--config", f"{file} is a folder, but a file is expected", fix)
    try:
        file.stat()
        content = read_preset(file)
    except OSError as failure:
        raise LaunchError("--config", f"{file} cannot be read ({failure.strerror})", fix) from failure
    except LaunchError as failure:
        raise LaunchError("--config", f"{file} is not valid YAML: {failure.problem}", fix) from failure
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise LaunchError("--config", f"{file} holds no keys", fix)
    if content.keys() >= PLAN_PARTS:
        fix = f"kt-launch replay run={quoted(str(file.parent))} starts it, also with other settings."
        raise LaunchError("--config", f"{file} is a run's plan, and no config", fix)
    if content and not content.keys() & {*Config.model_fields, MADE_WITH}:
        some = shown([str(name) for name in content])
        raise LaunchError("--config", f"{file} is not a config of kt-launch: it has {some}", fix)
    return content


def hydra_override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar, with the prefix that lets a dictionary's key be new. Raises LaunchError for YAML
    types that no key accepts: dates, bytes, sets."""
    try:
        return f"{'++' if in_dictionary(key) else ''}{key}={_in_grammar(value)}"
    except TypeError as failure:
        kinds = "neither a text nor a number, true, false, null or a list of them"
        raise LaunchError(key, f"got {shown([str(value)])}, which is {kinds}", "Put it in quotes.") from failure


def _in_grammar(value: Any) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(_in_grammar(item) for item in value)}]"
    return "null" if value is None else json.dumps(value)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their dotted keys; an empty dictionary of names that the user chooses has none."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and (value or key in _open_keys()):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _open_keys() -> set[str]:
    return {key for key, field in read_fields() if is_open(field)}
