"""Keeps secrets out of everything that is written: plans, run folders, logs.

A secret argument of the server, such as --api-key, is moved into the environment where it is first read, and replaced
by a reference (env:NAME, or file:PATH if the user keeps it in a file); kt_sglang puts the value back inside the
server's process.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kt_model.atomic_file import read_regular
from kt_model.user_paths import absolute, expanded

REFERENCE, FILE_REFERENCE = "env:", "file:"
KEY_BYTES = 4096
MASK = "***"
SHORTEST = {"--api-key": "--ap", "--admin-api-key": "--ad", "--ssl-keyfile-password": "--ssl-keyfile-"}
"""SGLang's flags for secrets, and prefixes of them that its parser accepts."""
BEGINNINGS = "|".join(
    flag[:end] for flag, least in SHORTEST.items() for end in range(len(flag) - 1, len(least) - 1, -1)
)
SECRET_FLAG = re.compile(rf"--(?:[a-z0-9-]+-)?(?:key|token|password|secret)|{BEGINNINGS}")
SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASS|PAT|AUTH|CREDENTIALS?)(?:_|$)")
TYPED_SECRET = re.compile(
    rf"(?P<flag>{SECRET_FLAG.pattern})(?P<sign>['\"]?\s*[,=]\s*)(?P<value>'[^']*'|\"[^\"]*\"|[^,\]'\"]+)"
)
USER_IN_URL = re.compile(r"(?P<scheme>\w+://)[^/@\s]+@")
SHORTEST_MASKED = 4
"""Masking shorter values would hit innocent text."""


def hide_typed(words: Iterable[str], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """A typed command line, with secrets replaced by references."""

    def hide(match: re.Match[str]) -> str:
        value = match["value"].strip("'\"")
        return f"{match['flag']}{match['sign']}{_move(match['flag'], value, environ)}"

    return [TYPED_SECRET.sub(hide, word) for word in words]


def hide_arguments(words: list[str], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Arguments of the server, with secrets replaced by references."""
    hidden: list[str] = []
    for word in words:
        flag, joined, value = word.partition("=")
        if hidden and SECRET_FLAG.fullmatch(hidden[-1]):
            hidden.append(_move(hidden[-1], word, environ))
        elif joined and SECRET_FLAG.fullmatch(flag):
            hidden.append(f"{flag}={_move(flag, value, environ)}")
        else:
            hidden.append(word)
    return hidden


def _key_of(environ: Mapping[str, str], name: str) -> str:
    """Raises KeyError, also if it is empty: SGLang treats that as no key at all, and admits everybody."""
    if not environ[name].strip():
        raise KeyError(name)
    return environ[name]


def _read_key(file: Path) -> str:
    """Raises OSError, also if it is not text that a header can carry."""
    try:
        key = read_regular(file, KEY_BYTES).decode().strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable():
        raise OSError(errno.EINVAL, "it holds no key: a line of text is expected", str(file))
    return key


def show_arguments(words: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The reverse: references replaced by their values. Raises KeyError with a variable that is not set or empty, or
    OSError."""

    def show(word: str, secret: bool) -> str:
        if secret and word.startswith(FILE_REFERENCE):
            return _read_key(expanded(word.removeprefix(FILE_REFERENCE)))
        return _key_of(environ, word.removeprefix(REFERENCE)) if word.startswith(REFERENCE) else word

    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, joined, value = word.partition("=")
        if joined and SECRET_FLAG.fullmatch(flag):
            shown.append(f"{flag}={show(value, True)}")
        else:
            shown.append(show(word, SECRET_FLAG.fullmatch(before) is not None))
    return shown


def absolute_place(place: str) -> str:
    """Where a key is, for whoever reads it from another folder."""
    file = place.removeprefix(FILE_REFERENCE)
    return FILE_REFERENCE + str(absolute(file)) if file != place else place


def references(words: Iterable[str]) -> list[str]:
    """Names of the variables that the arguments refer to."""
    values = (word.partition("=")[2] if word.startswith("--") else word for word in words)
    return [value.removeprefix(REFERENCE) for value in values if value.startswith(REFERENCE)]


def key_files(words: Sequence[str]) -> list[Path]:
    """Absolute paths of the files that the arguments refer to."""
    pairs = [word.partition("=")[::2] for word in words] + list(pairwise(words))
    values = [value for flag, value in pairs if SECRET_FLAG.fullmatch(flag)]
    return [absolute(value.removeprefix(FILE_REFERENCE)) for value in values if value.startswith(FILE_REFERENCE)]


def is_secret(variable: str) -> bool:
    """Whether an environment variable's name indicates that its value is a secret."""
    return SECRET_NAME.search(variable) is not None


def secrets_of(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Values that no log may show, longest first."""
    found = {value for name, value in environ.items() if is_secret(name) and len(value) >= SHORTEST_MASKED}
    return sorted(found, key=len, reverse=True)


def mask(text: str, secrets: Iterable[str]) -> str:
    """The text with its secrets masked, and user and password removed from URLs."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return USER_IN_URL.sub(rf"\g<scheme>{MASK}@", text)


def mask_all(value: Any, secrets: list[str]) -> Any:
    """Plain data with all of its texts masked; a text that is itself a secret is masked however short it is."""
    if isinstance(value, str):
        return MASK if value in secrets else mask(value, secrets)
    if isinstance(value, dict):
        return {key: mask_all(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [mask_all(each, secrets) for each in value]
    return value


def _move(flag: str, value: str, environ: MutableMapping[str, str]) -> str:
    """Store a secret in the environment under a name made from its flag; returns the reference."""
    if value.startswith((REFERENCE, FILE_REFERENCE)) or not value:
        return value
    name = f"KT_LAUNCH_{flag.strip('-').upper().replace('-', '_')}"
    number = 2
    while environ.get(name, value) != value and number < 100:
        name, number = f"KT_LAUNCH_{number}_{flag.strip('-').upper().replace('-', '_')}", number + 1
    environ[name] = value
    return REFERENCE + name
