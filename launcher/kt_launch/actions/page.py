"""The content of an action's page: PAGE in each action's file. The keys' help is their docstring in the schema; a page
only adds what that cannot say. manual.py formats it.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH_KEYS = ("model.", "lora.", "kt.", "server.", "proof.", "paths.", "hub.")
ADAPTER_KEYS = (
    *("model.path", "model.folder", "model.hub", "model.revision", "hub.", "paths.models", "paths.loras"),
    *("lora.adapters", "lora.path", "lora.name", "lora.layout"),
)
RUN_KEYS = ("run", "paths.runs")


@dataclass(frozen=True)
class Data:
    """What an action prints with --json. of: a sentence's end, such as `a list with an object for each run`; fields:
    name and meaning, all of them."""

    of: str
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """text: paragraphs. examples: commands and what each is for. keys: those it reads, or prefixes ending in a dot.
    picture: whether docs/pictures has one of it. data: what it prints with --json, if anything."""

    text: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    keys: tuple[str, ...] = ()
    picture: bool = False
    data: Data | None = None
