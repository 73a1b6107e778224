"""Downloads a model or adapters from the Hugging Face Hub into its cache. First says what will be downloaded and
whether it will fit, judged by config.json and the list of files. The Hub's own package downloads; it is imported only
here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_launch.config.schema import Config
from kt_launch.gathering.sizing import size_up
from kt_launch.machine.host import Host
from kt_model.errors import LaunchError, Problems
from kt_model.estimated_checkpoint import estimate_checkpoint
from kt_model.hubcache import (
    BESIDE,
    INDEX,
    Repository,
    cache_folder,
    download_command,
    find_snapshot,
    is_whole,
    repository_folder,
    require_repository,
    weight_names,
)
from kt_model.printable import say
from kt_model.units import gib
from kt_model.user_paths import absolute, nearest_folder

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
YES = ("1", "on", "true", "yes")
DRAFT_OF_REF, DRAFT_S = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp"), 0.5
"""The Hub's package names drafts of refs like this; one that is older is not being written any more."""
MAY_ASK = ("serve", "bench", "chat", "quantize", "merge")
"""Actions that may ask on a terminal before downloading."""


@dataclass(frozen=True)
class Wanted:
    """A repository that a launch names, and the key that names it."""

    key: str
    repository: Repository
    is_model: bool


@dataclass(frozen=True)
class Listing:
    """The files to download of a commit. files: name -> bytes."""

    commit: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def wanted_of(config: Config) -> Iterator[Wanted]:
    """The repositories that a config names without a path that replaces them."""
    model = config.model
    if model.hub and not model.path:
        yield Wanted("model", require_repository("model.hub", model.hub, model.revision), True)
    for name, adapter in config.lora.adapters.items():
        if adapter.hub and not adapter.path:
            key = f"lora.adapters.{name}"
            yield Wanted(key, require_repository(f"{key}.hub", adapter.hub, adapter.revision), False)


def fetch(config: Config, host: Callable[[], Host], problems: Problems) -> None:
    """Download everything that is not cached, if hub.download or an answer on the terminal allows it. What cannot be
    downloaded is reported as a mistake, with the command that downloads it elsewhere."""
    wanted_ones: list[Wanted] = []
    with problems.collect():
        wanted_ones += wanted_of(config)
    for wanted in wanted_ones:
        found = find_snapshot(wanted.repository, os.environ)
        if found is None or not is_whole(found):
            try:
                _fetch_one(wanted, config, host)
            except LaunchError as failure:
                problems.add_error(failure)
                problems.explained(wanted.key)
        _remove_abandoned(wanted.repository)


def _remove_abandoned(repository: Repository) -> None:
    """Remove partial files left by killed downloads of files that are complete by now: each attempt has its own name,
    which the Hub's package never looks for again."""
    folder = repository_folder(repository, os.environ)
    for draft in (folder / "blobs").glob("*.incomplete"):
        if draft.with_name(draft.name.partition(".")[0]).exists():
            with contextlib.suppress(OSError):
                draft.unlink()
    for draft in (folder / "refs").rglob("*.tmp"):
        with contextlib.suppress(OSError):
            match = DRAFT_OF_REF.fullmatch(draft.name)
            old = time.time() - draft.stat().st_mtime > DRAFT_S
            if match and old and draft.with_name(match[1]).exists():
                draft.unlink()


def fetch_config(config: Config) -> Path:
    """The model's config.json alone, from the cache or from the Hub. Raises LaunchError."""
    wanted = next(wanted_of(config))
    found = find_snapshot(wanted.repository, os.environ)
    if found and (found / "config.json").is_file():
        return found / "config.json"
    with _connected(wanted) as hub:
        name = wanted.repository.name
        commit = _commit(hub.HfApi(), wanted.repository)  # fails at once; a download would retry for a minute
        return Path(hub.hf_hub_download(name, "config.json", revision=commit))


def _fetch_one(wanted: Wanted, config: Config, host: Callable[[], Host]) -> None:
    with _connected(wanted) as hub:
        listing = _list(wanted, hub)
        if wanted.is_model:
            file = hub.hf_hub_download(wanted.repository.name, "config.json", revision=listing.commit)
    if wanted.is_model:
        _require_fit(wanted, config, host(), Path(file))
    _require_disk(wanted, listing)
    if not config.hub.download and not _asked(wanted, listing, config):
        size = f"{listing.bytes / 1e9:.2f} GB in {len(listing.files)} files would be downloaded"
        raise missing(wanted.key, wanted.repository, f"({size})", offer=True)
    say(f"{wanted.repository.name}@{listing.commit[:12]}: {listing.bytes / 1e9:.2f} GB to {_cache()}", file=sys.stderr)
    say("(if interrupted, the same command resumes with the incomplete files)", file=sys.stderr)
    with _connected(wanted) as hub:
        options = {"revision": wanted.repository.revision, "allow_patterns": list(listing.files)}
        hub.snapshot_download(wanted.repository.name, **options)


def missing(key: str, repository: Repository, why: str, *, offer: bool = False) -> LaunchError:
    """The error for a repository that is not in the cache."""
    problem = f"{repository} is neither a folder here nor in the Hub's cache ({_cache()}) {why}".rstrip()
    fix = f"run: {download_command(repository)}"
    near = nearest_folder(absolute(repository.name))
    if offer:
        fix = f"Set hub.download=true, or {fix}"
    else:
        fix = f"{f'Did you mean {key}={near}? ' if near else ''}Where there is a network, {fix}"
    return LaunchError(key, problem, fix)


def _cache() -> Path:
    return cache_folder(os.environ)


def _import_hub(wanted: Wanted) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as failure:
        problem = f"{wanted.repository} is not in the Hub's cache, and huggingface_hub is not installed"
        fix = f"Run {sys.executable} -m pip install huggingface_hub, then this again."
        raise LaunchError(wanted.key, problem, fix) from failure
    return huggingface_hub


def _list(wanted: Wanted, hub: Any) -> Listing:
    """The commit and its files to download: the safetensors that the index names, configs, tokenizer and templates."""
    api, name = hub.HfApi(), wanted.repository.name
    commit = _commit(api, wanted.repository)
    tree = api.list_repo_tree(name, revision=commit, recursive=True)
    sizes = {str(each.path): int(each.size) for each in tree if getattr(each, "size", None) is not None}
    shards = [file for file in sizes if file.endswith(".safetensors")]
    if INDEX in sizes and wanted.is_model:
        named = weight_names(Path(hub.hf_hub_download(name, INDEX, revision=commit)).parent)
        shards = [file for file in shards if file in named]
    beside = [file for file in sizes if any(fnmatch.fnmatch(file, pattern) for pattern in BESIDE)]
    if not shards:
        problem = f"{wanted.repository} has no safetensors files; pickles (.bin, .pt) are never read"
        raise LaunchError(wanted.key, problem, "Choose a repository with safetensors, or convert it.")
    return Listing(commit, {file: sizes[file] for file in sorted({*shards, *beside})})


def _commit(api: Any, repository: Repository) -> str:
    """The commit that the revision names now."""
    return str(api.repo_info(repository.name, revision=repository.revision).sha)


def _require_fit(wanted: Wanted, config: Config, host: Host, file: Path) -> None:
    """Refuse what would not fit into this machine's memory, as the plan would after the download."""
    fit = size_up(estimate_checkpoint(file, wanted.key), config, host)
    for budget in fit.short:
        if config.server.fit == "refuse":
            other = f"kt-launch fit {wanted.key}={wanted.repository} shows what other methods take"
            fix = f"{other}; server.fit=warn downloads it anyway."
            raise LaunchError(wanted.key, f"{wanted.repository} does not fit: {budget}", fix)
        say(f"warning: {wanted.repository}: {budget}", file=sys.stderr)


def _require_disk(wanted: Wanted, listing: Listing) -> None:
    place = next(folder for folder in (_cache(), *_cache().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < listing.bytes:
        problem = f"{wanted.repository} has {gib(listing.bytes)} GiB, but {_cache()} has {gib(free)} GiB free"
        raise LaunchError(wanted.key, problem, "Set HF_HOME to a folder with more room.")


def _asked(wanted: Wanted, listing: Listing, config: Config) -> bool:
    """The answer of a person at the terminal; no if there is none."""
    if config.action.name not in MAY_ASK or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    size = f"{listing.bytes / 1e9:.2f} GB"
    print(f"Download {size} of {wanted.repository} to {_cache()}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def _connected(wanted: Wanted) -> Iterator[Any]:
    """The Hub's package. Its failures, and those of the connection, become LaunchErrors without any request content."""
    key, repository = wanted.key, wanted.repository
    if any(os.environ.get(name, "").lower() in YES for name in OFFLINE):
        raise missing(key, repository, "and the Hub is switched off (HF_HUB_OFFLINE)")
    hub = _import_hub(wanted)
    try:
        yield hub
    except LaunchError:
        raise
    except hub.errors.GatedRepoError:
        problem = f"{repository} is gated: its owners grant access"
        raise LaunchError(key, problem, "Request access there, then run hf auth login.") from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as failure:
        what = "no such revision on the Hub" if isinstance(failure, hub.errors.RevisionNotFoundError) else "not there"
        problem = f"{repository} is neither a folder here nor on the Hub ({what})"
        raise LaunchError(key, problem, "For a private one run hf auth login.") from None
    except Exception as failure:
        raise missing(key, repository, f"and the Hub cannot be reached ({type(failure).__name__})") from None
