"""Typing mistakes on a command line, and what was meant: spaces inside key=value, keys typed as flags.

Only looks at words; what a correct override means is decided in arguments.py and compose.py.
"""

from __future__ import annotations

import re

from kt_launch.config.actions import ACTIONS, PAGES
from kt_launch.config.folder_presets import PACKAGES
from kt_launch.config.schema import is_text, read_fields
from kt_model.errors import LaunchError, quoted
from kt_model.nearest import nearest_name
from kt_model.user_paths import expanded

# What replaces the flags of kt-kernel's SGLang, and others that are often tried.
KEYS_OF_FLAGS = {
    "kt-moe-lora-path": "lora.path",
    "kt-moe-sft-method": "kt.method",
    "tp-size": "server.tp",
    "tensor-parallel-size": "server.tp",
    "dp-size": "server.dp",
    "data-parallel-size": "server.dp",
    "nnodes": "server.nodes",
    "dist-init-addr": "server.rendezvous",
}
OTHER_FLAGS = {
    "dry-run": "Did you mean kt-launch plan?",
    "kt-moe-lora-rank": "Leave it out: adapter_config.json has it.",
    "kt-moe-lora-alpha": "Leave it out: adapter_config.json has it.",
    "enable-lora": "Leave it out: lora.path=/path/to/folder turns adapters on.",
}
GROUPS = ("action", "kt", "lora", "model", "server", "sweep")


def join_pieces(word: str, waiting: list[str]) -> str:
    """The override that starts with `word`. If it was split into pieces, they are taken from `waiting`, and it is
    refused."""
    key, has_value, value = (part.strip() for part in word.partition("="))
    if not _is_known(key):
        return word
    pieces = [word]
    while waiting and _continues(key, " ".join([value, *pieces[1:]]).strip(" ="), waiting[0]):
        pieces.append(waiting.pop(0))
    typed = " ".join(pieces)
    if len(pieces) == 1 and (not has_value or word == f"{key}={value}" or not word.startswith(f"{key} ")):
        return word
    meant = re.sub(r"\s*=\s*|\s+", "=", typed, count=1)
    if re.search(r"=\[.*\]$", meant):
        meant = re.sub(r"[\s,]+", ",", meant)
    raise LaunchError(key, f"{typed!r} has spaces in it, but key=value is expected", f"Set {quoted(meant)}.")


def _is_known(key: str) -> bool:
    return key in GROUPS or any(name == key for name, _ in read_fields())


def _continues(key: str, value: str, word: str) -> bool:
    """Whether a word makes sense only as part of the value before it; names of actions stand for themselves."""
    field = dict(read_fields()).get(key)
    is_free = _is_folder(value, word) if key in PACKAGES else field is not None and is_text(field)
    if value and not is_free:
        return False
    if not word.strip() or word.startswith(("-", "~", "+")) or _is_known(word):
        return False
    if word in PAGES or (word in ACTIONS and key != "action"):
        return False
    return "=" not in word or (word.startswith("=") and not value)


def _is_folder(value: str, word: str) -> bool:
    """Whether a value is a path, perhaps only together with the next word, judged by the files that exist."""
    whole = f"{value} {word}".partition("/")[0]
    return "/" in value or ("/" in word and expanded(whole).is_dir())


def unknown_flag(flag: str, value: str | None, flags: tuple[str, ...]) -> LaunchError:
    """An unknown flag: another flag, an action, a key written as a flag, or one of SGLang's was meant."""
    near = None if flag.lstrip("-") in GROUPS else nearest_name(flag, flags)
    if near:
        return LaunchError(flag, "no such flag", f"Did you mean {near}?")
    name = flag.lstrip("-")
    if name in OTHER_FLAGS:
        return LaunchError(flag, "no such flag", OTHER_FLAGS[name])
    if name in ACTIONS:
        return LaunchError(flag, "no such flag", f"Did you mean kt-launch {name}?")
    if key := _meant_key(name):
        field = dict(read_fields()).get(key)
        meant = value or ("true" if field and field.annotation is bool else "...")
        return LaunchError(flag, "no such flag", f"Keys have no dashes: {quoted(f'{key}={meant}')}")
    words = f"{flag},{value}" if value else flag
    fix = f"kt-launch --help lists the flags; for one of SGLang's set server.extra_args=[{words}]."
    return LaunchError(flag, "no such flag", fix)


def _meant_key(name: str) -> str | None:
    """The key that a flag such as --kt-cpuinfer, --model-path or --port spells."""
    spelled = {key.replace(".", "-").replace("_", "-"): key for key, _ in read_fields()}
    typed = name.replace(".", "-").replace("_", "-")
    same_end = [key for words, key in spelled.items() if words.endswith(f"-{typed}")]
    of_server = [key for key in same_end if key.startswith("server.")]
    only = of_server or (same_end if len(same_end) == 1 else [])
    near = name if name in GROUPS else KEYS_OF_FLAGS.get(name) or spelled.get(typed) or next(iter(only), None)
    if near or len(typed) < 4:
        return near
    close = nearest_name(typed, spelled)
    return spelled[close] if close and close.partition("-")[0] == typed.partition("-")[0] else None
