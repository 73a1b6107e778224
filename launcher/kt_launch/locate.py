"""Which folders a launch is about: the checkpoint's and the adapters', by path or below a root. Reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kt_launch.config import Config
from kt_launch.errors import LaunchError, Problems
from kt_launch.plan import Resolved
from kt_launch.sources import Sources


@dataclass(frozen=True)
class Place:
    """A folder that was asked for, the key that names it, and where that came from."""

    name: str
    path: Path
    key: str
    source: str


def locate_model(config: Config, sources: Sources, environ: Mapping[str, str]) -> Place:
    """The checkpoint's folder."""
    model = config.model
    path, source = _locate("model", model.path, model.folder, _model_root(config, sources, environ), sources)
    return Place(model.name or _plain_name(path), path, "model.path", source)


def locate_adapters(config: Config, sources: Sources, environ: Mapping[str, str], problems: Problems) -> list[Place]:
    """The adapters' folders: those of the presets, and the one given by hand."""
    lora = config.lora
    names = list(lora.adapters)
    only = names[0] if len(names) == 1 else None
    places = {}
    for name, adapter in lora.adapters.items():
        if lora.path and name == (lora.name or only):
            continue
        key = f"lora.adapters.{name}"
        with problems.collect():
            path, source = _locate(key, adapter.path, adapter.folder, _adapter_root(config, sources, environ), sources)
            renamed = lora.name if lora.name and not lora.path and only else name
            places[renamed] = Place(renamed, path, f"{key}.path", source)
    if lora.path:
        path = absolute(lora.path)
        given = lora.name or only or _plain_name(path)
        places[given] = Place(given, path, "lora.path", sources.of("lora.path"))
    elif lora.name and not only:
        problems.add("lora.name", f"{lora.name} names no adapter", "Type lora.path=/its/folder as well.")
    return list(places.values())


def absolute(path: str) -> Path:
    """A path as typed: ~ is the home, relative ones start at the working folder."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))


def _plain_name(path: Path) -> str:
    """A folder's name as a request may write it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-._") or "unnamed"


def _locate(key: str, path: str | None, folder: str | None, root: Resolved, sources: Sources) -> tuple[Path, str]:
    if path:
        return absolute(path), sources.of(f"{key}.path")
    if not folder:
        raise LaunchError(f"{key}.path", "no folder given", f"Type {key}.path=/its/folder.")
    if not root.value:
        problem = f"the folder {folder} is expected below a root, but none is given"
        raise LaunchError(f"{key}.path", problem, f"Set {root.source}, or type {key}.path=/its/folder.")
    return absolute(root.value) / folder, f"{root.source}; {sources.of(f'{key}.folder')}"


def _model_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Resolved:
    return _root("paths.models", config.paths.models, ("KT_LAUNCH_MODELS",), sources, environ)


def _adapter_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Resolved:
    root = _root("paths.loras", config.paths.loras, ("KT_LAUNCH_LORAS",), sources, environ)
    if root.value:
        return root
    models = _model_root(config, sources, environ)
    return models if models.value else root


def _root(
    key: str, given: str | None, variables: Sequence[str], sources: Sources, environ: Mapping[str, str]
) -> Resolved:
    if given:
        return Resolved(given, sources.of(key))
    for variable in variables:
        if environ.get(variable):
            return Resolved(environ[variable], f"environment: {variable}={environ[variable]}")
    return Resolved(None, variables[0])
