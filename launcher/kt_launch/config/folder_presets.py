"""Folders given in place of a preset, as in model=/x and lora=[west,/y], and names on the Hugging Face Hub: each stands
for a preset that is generated on demand. That preset's name is the typed text, encoded in letters that Hydra's grammar
accepts.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kt_model.adapter_siblings import cache_repository
from kt_model.hubcache import Repository, as_repository
from kt_model.user_paths import absolute, expanded

PREFIX = "typed_folder_"
OPTION = re.compile(PREFIX + r"([0-9a-f]+)")
PACKAGES: Mapping[str, str] = {"model": "model", "lora": "lora.adapters"}
"""Group -> the section that its presets fill."""

MODELS, LORAS = "KT_LAUNCH_MODELS", "KT_LAUNCH_LORAS"
"""Environment variables: the models' root, and the adapters' root where it is another one."""


def below_root(group: str, name: str) -> Path | None:
    """The folder of that name below a root of the environment, if there is one."""
    roots = {"model": (MODELS,), "lora": (LORAS, MODELS)}.get(group, ())
    given = next(filter(None, map(os.environ.get, roots)), None)
    folder = expanded(given) / name if given and name else None
    return folder if folder and folder.is_dir() else None


def is_folder(text: str) -> bool:
    """Whether a word means a folder or a name on the Hub, not a preset: by its spelling, or because the folder
    exists."""
    return text.startswith("~") or "/" in text or text in (".", "..") or Path(text).is_dir()


def option_of(folder: str) -> str:
    """The name of the preset that stands for a folder."""
    return PREFIX + os.fsencode(folder).hex()


def folder_of(option: str) -> str | None:
    """The folder that a preset of that name stands for, if it is one of these."""
    found = OPTION.fullmatch(option)
    return _decoded(found[1]) if found else None


def folders_in(override: str) -> list[str]:
    """The folders that an override names."""
    return [_decoded(found) for found in OPTION.findall(override)]


def as_folders(text: str) -> str:
    """A text with those preset names replaced by their folders."""
    return OPTION.sub(lambda found: _decoded(found[1]), text)


def _decoded(letters: str) -> str:
    return os.fsdecode(bytes.fromhex(letters))


def content_of(group: str, folder: str) -> dict[str, Any]:
    """What that preset contains, within its group's section."""
    on_hub = hub_of(folder)
    said = {"hub": on_hub.name, "revision": on_hub.revision} if on_hub else {"path": folder}
    return said if group == "model" else {adapter_name(folder): said}


def key_of(group: str, folder: str) -> str:
    """The key whose value is the folder or the name on the Hub."""
    section = "model" if group == "model" else f"lora.adapters.{adapter_name(folder)}"
    return f"{section}.{'hub' if hub_of(folder) else 'path'}"


def hub_of(text: str) -> Repository | None:
    """The repository on the Hub that is meant, unless there is a folder of that name here."""
    return None if expanded(text).exists() else as_repository(text.rstrip("/"))


def plain_name(folder: Path) -> str:
    """A folder's name in the form that requests can use: accents removed, and - for other characters. A snapshot in the
    Hub's cache, whose folder is named after a commit, has its repository's name."""
    repository = cache_repository(folder)
    own = repository.name.rpartition("--")[2] if repository else folder.name
    letters = unicodedata.normalize("NFKD", own.replace("ß", "ss")).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip("-._") or "unnamed"


def adapter_name(folder: str) -> str:
    """The same, valid also as part of a key."""
    on_hub = hub_of(folder)
    folder = on_hub.name if on_hub else folder
    name = plain_name(absolute(folder)).replace(".", "-")
    return name if name[0].isalpha() else f"lora-{name}"
