"""Hydra: search path, composition, multirun, and its errors in our words. mistakes.py has those of what was typed,
sweep_values.py the functions of a sweep.

No Hydra or OmegaConf type leaves this file: the other rooms get plain dictionaries and Sources.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from kt_launch.config import mistakes
from kt_launch.config.actions import ACTION, ACTIONS, DEFAULT_ACTION
from kt_launch.config.dump import hydra_override
from kt_launch.config.folder_presets import OPTION, PACKAGES, content_of, folder_of
from kt_launch.config.presetfile import FIX, read_preset, validate_preset, yaml_problem
from kt_launch.config.presets import config_folders, read_groups
from kt_launch.config.schema import Config, is_list
from kt_launch.config.sources import Sources, as_typed, read_sources
from kt_launch.config.sweep_values import require_values, write_out_glob
from kt_launch.machine.folders import conf_folder, demo_folder
from kt_model.errors import LaunchError, Problems, quoted

CONFIG_NAME = "config"
MIXED = "lora"
"""The group in which a launch may choose several presets."""
NO_VALUE = "an action or key=value is expected"
FILES = ("file", "preset")
"""Schemes of folder sources: Hydra's, and PresetSource's."""
OWN_DETAILS = ("full_key:", "object_type", "reference_type")
FAILURES = (HydraException, OmegaConfBaseException, YAMLError)
UNRESOLVED = (InterpolationResolutionError, UnsupportedInterpolationType, MissingMandatoryValue)
REFERENCES = (
    (
        re.compile(r"Environment variable '(.*?)' not found"),
        "${{oc.env:{0}}} stands for the environment variable {0}, which is not set",
        "Run export {0}=<value> first, or set {key}=<value>.",
    ),
    (
        re.compile(r"Interpolation key '(.*?)' not found"),
        "${{{0}}} stands for the value of {0}, but there is no such key",
        "kt-launch --help lists the keys.",
    ),
    (
        re.compile(r"Unsupported interpolation type (\S+)"),
        "there is no resolver named {0}, expected ${{oc.env:NAME}} or ${{section.key}}",
        "Set {key}=<value>.",
    ),
    (re.compile("Missing mandatory value"), "??? stands for a value that must be given", "Set {key}=<value>."),
)
"""OmegaConf's message for an unresolvable reference, and ours."""


@dataclass(frozen=True)
class Composed:
    """One job's config as plain data, and where its values came from."""

    raw: dict[str, Any]
    sources: Sources
    overrides: list[str]
    """As a person would type them."""


STORED: dict[str, Any] = {}
"""What this process has registered with Hydra, by its name there."""


class PresetSource(FileConfigSource):
    """A folder of YAML files that are checked before Hydra builds anything from them."""

    @staticmethod
    def scheme() -> str:
        return FILES[1]

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        if file.exists():
            validate_preset(file, read_preset(file))
        return super().load_config(config_path)


class Folders(ConfigRepository):
    """Where Hydra finds configs. It deep-copies this for each config, to search other folders, and with it all that is
    registered: an eighth of a plan's time."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Folders:
        return copy.copy(self)  # folders are replaced, and never added to


class Composer:
    """Composes configs from the shipped folder and, searched first, the user's."""

    def __init__(self, config_dir: str | None) -> None:
        self.folders = config_folders(config_dir)
        _register()
        search_path = create_config_search_path(str(conf_folder()))
        for folder in self.folders[:-1]:
            search_path.prepend("user", f"{PresetSource.scheme()}://{folder}", anchor="main")
        version.setbase("1.3")
        GlobalHydra.instance().clear()
        self.hydra = Hydra.create_main_hydra2("kt-launch", search_path)
        cast(ConfigLoaderImpl, self.hydra.config_loader).repository = Folders(search_path)

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Every group of ours with its choices."""
        return read_groups(self.folders)

    def check(self, overrides: list[str], multirun: bool, problems: Problems) -> list[str]:
        """The valid overrides; mistakes, each with what to type instead, are added to `problems`."""
        right, meant = [], []
        _register_folders(overrides)
        for override in overrides:
            try:
                right.append(self._checked(override, multirun))
            except LaunchError as mistake:
                problems.add_error(mistake)
                meant.append(mistakes.meant_name(mistake.where, self.groups))
        for name in filter(None, meant):
            problems.explained(name)
        return right

    def compose(self, overrides: list[str]) -> Composed:
        """One job."""
        try:
            config = self.hydra.compose_config(CONFIG_NAME, overrides, RunMode.RUN, with_log_configuration=False)
            HydraConfig.instance().set_config(config)
            return read_composed(config)
        except FAILURES as failure:
            raise explain_failure(failure) from failure

    def settled(self, overrides: list[str]) -> list[str]:
        """The overrides that all jobs of a sweep share."""
        return [override for override in overrides if not _parse(override).is_sweep_override()]

    def multirun(self, overrides: list[str], job: Callable[[DictConfig], dict[str, Any]], folder: Path) -> None:
        """Run the jobs through Hydra's sweeper and launcher, one after another unless others are chosen; each leaves a
        row in `folder`."""
        placed = [hydra_override("hydra.sweep.dir", str(folder)), *overrides]
        try:
            with _own_logging(optuna=any("optuna" in word for word in overrides)):
                self.hydra.multirun(CONFIG_NAME, job, placed, with_log_configuration=False)
        except FAILURES as failure:
            raise explain_failure(failure) from failure

    def _checked(self, text: str, multirun: bool) -> str:
        """The override, with the matches of a glob(…) written out. Raises LaunchError."""
        override = _parse(text)
        if override.is_hydra_override():
            return text
        if multirun:
            text = write_out_glob(override, text, self.groups)
            override = _parse(text)
            require_values(override, text)
        self._check(override, text, multirun)
        return text

    def _check(self, override: Override, text: str, multirun: bool) -> None:
        key, groups = override.get_key_element().lstrip("+~").partition("@")[0], self.groups
        if not key:
            raise LaunchError(text, "key=value is expected", "kt-launch --help lists the keys.")
        if override.is_sweep_override() and not multirun:
            raise mistakes.refuse_sweep(text)
        if key == f"{ACTION}.name":
            fix = f"Type kt-launch {as_typed(text).partition('=')[2]}."
            raise LaunchError(key, "an action is typed by its name", fix)
        if key in groups:
            self._check_options(key, override, groups[key])
        elif override.is_delete() and mistakes.is_known(key):
            raise LaunchError(key, "a key cannot be deleted", mistakes.instead_of_deleting(key))
        elif mistakes.is_section(key):
            raise mistakes.refuse_section(key, text)
        elif not mistakes.is_known(key) and not any((folder / key).is_dir() for folder in self.folders):
            raise mistakes.unknown_name(key, text, groups)

    def _check_options(self, group: str, override: Override, options: list[str]) -> None:
        if isinstance(override.value(), list) and group != MIXED:
            typed = (override.input_line or "").partition("=")[2]
            problem = f"{typed} are several presets, but one is expected"
            raise LaunchError(group, problem, f"Set {group}=<one of them>.")
        for option in _chosen(override):
            name = "" if option is None else str(option)
            if not isinstance(option, str) or (name not in options and folder_of(name) is None):
                raise mistakes.unknown_option(group, name, options)


def read_composed(config: DictConfig) -> Composed:
    """A composed config as plain data; `hydra` must have been set in HydraConfig."""
    hydra = HydraConfig.get()
    overrides = cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False))
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema in FILES]
    sources = read_sources(overrides, dict(hydra.runtime.choices), folders, conf_folder())
    problems = Problems()
    raw = _plain(config, problems)
    problems.raise_if_any()
    raw[ACTION] = {"name": _typed_action(sources.typed, raw[ACTION]["name"])}
    return Composed(raw=raw, sources=sources, overrides=list(sources.typed))


def _typed_action(typed: Sequence[str], composed: str) -> str:
    """The action is always the typed one: no file and no preset of another group can start anything. composed: the
    value of the user's own preset in this group, if that was typed."""
    named = [override.removeprefix(f"{ACTION}=") for override in typed if override.startswith(f"{ACTION}=")]
    if not named:
        return DEFAULT_ACTION
    return named[-1] if named[-1] in ACTIONS else composed


def _plain(value: Any, problems: Problems) -> Any:
    """Plain data with every ${…} resolved; all that cannot be resolved are added to `problems`."""
    if not isinstance(value, DictConfig):
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_list(value) else value
    plain = {}
    for key in value:
        if key == "hydra":
            continue
        try:
            plain[str(key)] = _plain(value[key], problems)
        except OmegaConfBaseException as failure:
            problems.add_error(explain_failure(failure))
    return plain


def job_number() -> int | None:
    """This job's number in a multirun, or None."""
    job = HydraConfig.get().job
    return None if OmegaConf.is_missing(job, "num") or job.num is None else int(job.num)


def typed_overrides() -> list[str]:
    """This job's overrides, as a person would type them."""
    return [as_typed(str(override)) for override in HydraConfig.get().overrides.task]


def sweep_folder() -> Path:
    """The folder of the multirun that this job belongs to."""
    return Path(HydraConfig.get().sweep.dir)


def is_search() -> bool:
    """Whether this job's sweeper chooses the next jobs by the results of earlier ones."""
    return bool(HydraConfig.get().runtime.choices["hydra/sweeper"] != "basic")


def explain_failure(failure: Exception) -> LaunchError:
    """Hydra's and OmegaConf's own errors; the first line says what is wrong."""
    cause = failure if isinstance(failure, OmegaConfBaseException) else failure.__cause__ or failure
    if isinstance(failure, MissingConfigException) and failure.missing_cfg_file:
        group, _, option = failure.missing_cfg_file.rpartition("/")
        return mistakes.unknown_option(group or "config", option, list(failure.options or []))
    if isinstance(failure, YAMLError):
        mark = getattr(failure, "problem_mark", None)
        return LaunchError(mark.name if mark else "config", yaml_problem(failure), FIX)
    key = getattr(cause, "full_key", None) or "config"
    if isinstance(cause, UNRESOLVED):
        return _unresolved(str(key), str(cause))
    text = str(failure).strip() or str(cause)
    if "does not support sweep type" in text:
        fix = "Add sweep=optuna, or list the values: kt.cpuinfer=8,16."
        return LaunchError("-m", "interval(…) needs a sweeper that chooses values from it", fix)
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith(OWN_DETAILS)]
    return LaunchError(str(key), lines[0].rstrip("."), " ".join(lines[1:2]))


def _unresolved(key: str, text: str) -> LaunchError:
    """A value that refers to another one that does not exist."""
    for pattern, problem, fix in REFERENCES:
        if found := pattern.search(text):
            name = found.expand(r"\1") if found.groups() else ""
            return LaunchError(key, problem.format(name), fix.format(name, key=key))
    return LaunchError(key, text.splitlines()[0].rstrip("."), f"Set {key}=<value>.")


@contextlib.contextmanager
def hydra_of_others_kept() -> Iterator[None]:
    """Restores, after the block, the Hydra state of a program that uses Hydra itself."""
    hydra, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    base = version.VersionBase.instance().getbase()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, config
        version.VersionBase.instance().version_base = base


@contextlib.contextmanager
def _own_logging(optuna: bool) -> Iterator[None]:
    """Hydra silences every logger of the process for a sweep; this restores them afterwards, for instance in a
    notebook. Optuna logs its studies in colour, even if stderr is a file."""
    if optuna and find_spec("optuna"):
        import_module("optuna.logging").set_verbosity(logging.WARNING)
    root, known = logging.root, logging.Logger.manager.loggerDict.values()
    silent = [(logger, logger.disabled) for logger in known if isinstance(logger, logging.Logger)]
    level, handlers = root.level, [*root.handlers]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        for logger, disabled in silent:
            logger.disabled = disabled


def _register() -> None:
    """Register the schema's keys, so that Hydra knows them, the actions, and the path to the shipped demo; once a
    process, unless a program has put others in their place. Folders that an earlier command named are forgotten: Hydra
    copies whatever is registered for each config."""
    store = ConfigStore.instance()
    for group in PACKAGES:
        presets = store.repo.get(group, {})
        for name in [name for name in presets if OPTION.match(name)]:
            del presets[name]
    SourcesRegistry.instance().register(PresetSource)
    OmegaConf.register_new_resolver("kt_launch.demo", lambda name: str(demo_folder(name)), replace=True)
    if STORED and all(store.repo.get(name) is node for name, node in STORED.items()):
        return
    store.store(name="schema", node=Config().model_dump())
    for name in ACTIONS:
        store.store(group=ACTION, name=name, node={"name": name})
    STORED.update({name: store.repo[name] for name in ("schema.yaml", ACTION)})


def _register_folders(overrides: list[str]) -> None:
    """Register the presets that typed folders stand for."""
    store = ConfigStore.instance()
    for override in overrides:
        group = override.partition("=")[0]
        for found in OPTION.finditer(override) if group in PACKAGES else ():
            content = content_of(group, folder_of(found[0]) or "")
            store.store(group=group, name=found[0], node=content, package=PACKAGES[group])


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as failure:
        key, has_value, value = text.partition("=")
        if not has_value:
            raise LaunchError(text.strip() or "an empty word", NO_VALUE, mistakes.meant_word(text)) from failure
        if meant := mistakes.meant_override(text):
            raise LaunchError(text, NO_VALUE, meant) from failure
        problem = f"the value {value} cannot be read"
        fix = f"""Put it in quotes: "{key}='...'"."""
        if is_list(key):
            inside = value.removeprefix("[").removesuffix("]")
            fix = f"Set {quoted(f'{key}=[{inside}]')}, values separated by commas."
        raise LaunchError(key, problem, fix) from failure


def _chosen(override: Override) -> list[Any]:
    """The options that an override of a group names: one, a list, or those of a sweep."""
    choices = override.sweep_iterator() if override.is_choice_sweep() else [override.value()]
    return [part for choice in choices for part in (choice if isinstance(choice, list) else [choice])]
