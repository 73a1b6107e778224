"""What the Hugging Face Hub's cache on this machine has of a repository, in the layout of the Hub's own tools: one
folder per commit, which a branch's file names. Reads names and small JSON only; never contacts the Hub.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_model.atomic_file import read_regular
from kt_model.errors import LaunchError
from kt_model.user_paths import expanded

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
COMMIT, REF_BYTES = re.compile(r"\w{1,128}"), 4096
BRANCH = "main"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""What is downloaded besides safetensors: configs, tokenizers, templates. No pickles and no code."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub. revision: a branch, tag or commit."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def require_repository(key: str, name: str, revision: str | None) -> Repository:
    """The repository in a key's value. Raises LaunchError if it is not a name on the Hub."""
    if as_repository(name) is None or "@" in name:
        raise LaunchError(key, f"{name!r} is no name on the Hub, owner/name is expected", f"Set {key}=owner/name.")
    return Repository(name, revision)


def as_repository(text: str) -> Repository | None:
    """The repository that `owner/name` or `owner/name@revision` means; None for any other text."""
    found = NAME.fullmatch(text)
    return Repository(found["repo"], found["revision"]) if found else None


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the Hub's tools keep their downloads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return expanded(environ[name])
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return expanded(home) / "hub"


def repository_folder(repository: Repository, environ: Mapping[str, str]) -> Path:
    """The repository's folder in the cache, with all of its commits."""
    return cache_folder(environ) / f"models--{repository.name.replace('/', '--')}"


def find_snapshot(repository: Repository, environ: Mapping[str, str]) -> Path | None:
    """The folder of the commit that the revision meant when it was last downloaded, perhaps incomplete; the commit is
    its name."""
    folder = repository_folder(repository, environ)
    revision = repository.revision or BRANCH
    if ".." in revision:
        return None
    try:
        commit = read_regular(folder / "refs" / revision, REF_BYTES).decode().strip()
    except (OSError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    return found if COMMIT.fullmatch(commit) and found.is_dir() else None


def is_whole(folder: Path) -> bool:
    """Whether every weights file is there, for a checkpoint or an adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        return any(folder.glob("*.safetensors"))
    return (folder / "config.json").is_file() and all((folder / name).is_file() for name in weight_names(folder))


def weight_names(folder: Path) -> list[str]:
    """The weights files that a checkpoint's index names; without an index, the only one."""
    from kt_model.jsonfile import read_json_or_empty

    shards = read_json_or_empty(folder / INDEX).get("weight_map")
    return sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) and shards else [SINGLE]


def download_command(repository: Repository, shards: str = "*.safetensors") -> str:
    """The shell command that downloads it on a machine with a network."""
    words = ["hf", "download", repository.name, *(["--revision", repository.revision] if repository.revision else [])]
    return shlex.join([*words, *(word for pattern in (shards, *BESIDE) for word in ("--include", pattern))])
