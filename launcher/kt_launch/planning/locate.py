"""Which folders a launch uses: the checkpoint's and the adapters', by path or below a root. Reads no file.

A root is given by a key or by an environment variable; training.py resolves the folders of training runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kt_launch.config.folder_presets import LORAS, MODELS, plain_name
from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_model.adapter_siblings import siblings_folder
from kt_model.errors import LaunchError, Problems, quoted, shown
from kt_model.hubcache import cache_folder, download_command, find_snapshot, is_whole, require_repository
from kt_model.training import Training, folders_in, read_training
from kt_model.user_paths import absolute

SHOWN_NAMES = 5
"""How many names in a root are listed when a folder is not found."""


@dataclass(frozen=True)
class LocatedFolder:
    """A requested folder, the key that names it, and where that came from."""

    name: str
    path: Path
    key: str
    source: str
    layout: str = "auto"
    """For an adapter: the order of B's columns in fused experts, as in lora.layout."""
    training: Training | None = None
    """The training run of the checkpoint in `path`, if the run's folder was given."""
    commit: str | None = None
    """The commit of a snapshot in the Hub's cache."""


@dataclass(frozen=True)
class AllowedFolders:
    """Folders that adapters may be loaded from while the server runs, and where that came from."""

    paths: tuple[Path, ...]
    source: str


@dataclass(frozen=True)
class Root:
    """The folder that presets' folders are relative to. name: the key or variable that gives it, or would; path: as
    given."""

    name: str
    path: str | None
    source: str
    unset_fix: str = ""


def locate_model(config: Config, sources: Sources, environ: Mapping[str, str]) -> LocatedFolder:
    """The checkpoint's folder."""
    model = config.model
    if model.hub and not model.path:
        found, source = _in_cache("model", model.hub, model.revision, sources, environ)
        name = model.name or plain_name(Path(model.hub))
        return LocatedFolder(name, found, "model.path", source, commit=found.name)
    path, source = _locate("model", model.path, model.folder, _model_root(config, sources, environ), sources)
    return LocatedFolder(model.name or plain_name(path), path, "model.path", source)


def locate_adapters(
    config: Config, sources: Sources, environ: Mapping[str, str], problems: Problems
) -> list[LocatedFolder]:
    """The adapters' folders: those of the presets, and the one given by hand."""
    lora = config.lora
    only = next(iter(lora.adapters)) if len(lora.adapters) == 1 else None
    folders = {}
    for name in lora.adapters:
        if lora.path and name == (lora.name or only):
            continue
        with problems.collect():
            renamed = lora.name if lora.name and not lora.path and only else name
            folders[renamed] = _locate_adapter(name, renamed, config, sources, environ)
    if lora.path:
        path = absolute(lora.path)
        given = lora.name or only or plain_name(path)
        layout = (lora.adapters[given].layout if given in lora.adapters else None) or lora.layout
        folders[given] = _adapter_folder(given, path, "lora.path", sources.of("lora.path"), layout)
    elif lora.name and not only:
        problem = f"{lora.name} is not the name of an adapter"
        problems.add("lora.name", problem, "Set lora.path=/path/to/folder as well.")
    return list(folders.values())


def _locate_adapter(
    name: str, renamed: str, config: Config, sources: Sources, environ: Mapping[str, str]
) -> LocatedFolder:
    """That of one preset. Raises LaunchError."""
    adapter, key = config.lora.adapters[name], f"lora.adapters.{name}"
    shown_key = "lora" if sources.of(f"{key}.path").startswith("command line: lora=") else f"{key}.path"
    layout = adapter.layout or config.lora.layout
    if adapter.hub and not adapter.path:
        path, source = _in_cache(key, adapter.hub, adapter.revision, sources, environ)
        return replace(_adapter_folder(renamed, path, shown_key, source, layout), commit=path.name)
    path, source = _locate(key, adapter.path, adapter.folder, _adapter_root(config, sources, environ), sources)
    return _adapter_folder(renamed, path, shown_key, source, layout)


def locate_allowed(
    config: Config,
    sources: Sources,
    environ: Mapping[str, str],
    problems: Problems,
    adapters: Sequence[LocatedFolder] = (),
) -> AllowedFolders:
    """Folders that adapters may be loaded from later. A typed folder must exist."""
    key = "lora.allow"
    if config.lora.allow is not None:
        typed = tuple(absolute(path) for path in config.lora.allow)
        for path in typed:
            if not path.is_dir():
                problems.add(key, f"no folder {path}", "Make it, or name the folder that adapters will lie in.")
        return AllowedFolders(typed, sources.of(key))
    if adapters:
        homes = dict.fromkeys(siblings_folder(one.training.folder if one.training else one.path) for one in adapters)
        return AllowedFolders(tuple(homes), "derived: the folders that the chosen adapters lie in")
    root = _adapter_root(config, sources, environ)
    if root.path:
        return AllowedFolders((absolute(root.path),), f"the adapters' root, {root.source}")
    return AllowedFolders((), "default: there is no adapters' root")


def _adapter_folder(name: str, folder: Path, key: str, source: str, layout: str) -> LocatedFolder:
    training = read_training(folder)
    return LocatedFolder(name, training.path if training else folder, key, source, layout, training)


def _in_cache(
    key: str, hub: str, revision: str | None, sources: Sources, environ: Mapping[str, str]
) -> tuple[Path, str]:
    """The snapshot in the Hub's cache, and where its name came from. Raises LaunchError if it is missing or
    incomplete."""
    repository = require_repository(f"{key}.hub", hub, revision)
    found = find_snapshot(repository, environ)
    if found is None or not is_whole(found):
        problem = f"{repository} is not in the Hub's cache ({cache_folder(environ)})"
        raise LaunchError(key, problem, f"Set hub.download=true, or run: {download_command(repository)}")
    return found, f"the Hub's cache; {sources.of(f'{key}.hub')}"


def _locate(key: str, path: str | None, folder: str | None, root: Root, sources: Sources) -> tuple[Path, str]:
    if path:
        return absolute(path), sources.of(f"{key}.path")
    if not folder:
        raise LaunchError(f"{key}.path", "no folder given", f"Set {key}.path=/path/to/folder.")
    if not root.path:
        problem = f"the folder {folder} is expected below a root, but none is given"
        raise LaunchError(f"{key}.path", problem, f"Set {root.unset_fix}, or set {key}.path=/path/to/folder.")
    top = absolute(root.path)
    if not (top / folder).exists():
        raise _not_below(key, folder, root, top)
    return top / folder, f"{root.source}; {sources.of(f'{key}.folder')}"


def _not_below(key: str, folder: str, root: Root, top: Path) -> LaunchError:
    """What is found in place of the folder, or of its root."""
    where, other = f"{key}.path", f"or set {key}.path=/path/to/folder"
    if not top.is_dir():
        what = f"{top} is a file, but a folder with {folder} in it is expected"
        problem = what if top.exists() else f"no folder {top}, in which {folder} is expected"
        fix = f"Set {root.name} to the folder that holds it, {other}."
        return LaunchError(where, f"{problem} ({root.source})", fix)
    if top.name == Path(folder).name:
        problem = f"no folder {folder} in {top}, which may itself be that folder ({root.source})"
        return LaunchError(where, problem, f"Set {root.name}={top.parent}, {other}.")
    inside = [name for name in folders_in(top) if not name.startswith(".")]
    problem = f"no folder {folder} in {top} ({root.source}), which holds {shown(inside, SHOWN_NAMES) or 'no folder'}"
    if near := _nearest_folder(folder, top, inside):
        return LaunchError(where, problem, f"Did you mean {quoted(f'{key}.folder={near}')}?")
    return LaunchError(where, problem, f"Set {root.name} to the folder that holds it, {other}.")


def _nearest_folder(folder: str, top: Path, inside: list[str]) -> str | None:
    """A similar name, or the same name one level deeper, as with a hub's owner/name."""
    from kt_model.nearest import nearest_name

    deeper = next((f"{owner}/{folder}" for owner in inside if (top / owner / folder).is_dir()), None)
    lower = {name.lower(): name for name in inside}
    near = nearest_name(folder.lower(), lower)
    return deeper or (lower[near] if near else None)


def _model_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Root:
    return _root("paths.models", config.paths.models, MODELS, MODELS, sources, environ)


def _adapter_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Root:
    """The models' root if no other is given; a message would still suggest setting the adapters' own."""
    either = f"{LORAS} (or {MODELS}, where adapters lie beside the models)"
    root = _root("paths.loras", config.paths.loras, LORAS, either, sources, environ)
    models = _model_root(config, sources, environ)
    return root if root.path or not models.path else Root(LORAS, models.path, models.source)


def _root(
    key: str, given: str | None, variable: str, unset_fix: str, sources: Sources, environ: Mapping[str, str]
) -> Root:
    if given:
        return Root(key, given, sources.of(key))
    if environ.get(variable):
        return Root(variable, environ[variable], f"environment: {variable}={environ[variable]}")
    return Root(variable, None, "default", unset_fix)
