"""The user's cache, and paths as typed by users: ~ becomes the home folder, and for a folder that does not exist, what
was probably meant. Opens no file, and raises for no text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kt_model.errors import quoted

ADDRESS = re.compile(r"(?:^|/)(?P<scheme>https?|hf|file):/+(?P<rest>.*)")
WINDOWS = re.compile(r"(?:^|/)(?P<drive>[A-Za-z]):[\\/]+(?P<rest>.*)")
VARIABLE = re.compile(r"\$\{?(\w+)")
ANOTHER_KEY = re.compile(r"\s[a-z_][\w.]*=")
ESCAPED = re.compile(r"\\(?=[ ()&'])")
STRAY = " \t\"'`“”„‘’‚="
"""Characters at the ends of a name that are typing mistakes: a space, typographic quotes, a second =."""
HUB = "huggingface.co/"


def expanded(text: str | Path) -> Path:
    """With ~ replaced by the home folder. The home of an unknown user stays as typed, as in a shell."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path.expanduser raises for an unknown user


def cache_root() -> Path:
    """The user's cache, or KT_LAUNCH_CACHE."""
    from platformdirs import user_cache_dir

    return expanded(os.environ.get("KT_LAUNCH_CACHE") or user_cache_dir("kt-launch", appauthor=False)).absolute()


def absolute(text: str | Path) -> Path:
    """A path as typed: ~ is the home folder, relative paths start at the working folder."""
    return Path(os.path.normpath(expanded(text).absolute()))


def advice(path: str | Path, where: str) -> str:
    """What to do if there is no such folder. where: the key that names it."""
    return slip_in(str(path), where) or _nearest(absolute(path), where) or f"Set {where}=/path/to/folder."


def slip_in(text: str, where: str) -> str | None:
    """What to do about a path in a form that cannot be right here; None for any other."""
    return next((said for look in SLIPS if (said := look(text, where))), None)


def _address(text: str, where: str) -> str | None:
    found = ADDRESS.search(text)
    if found is None:
        return None
    rest = found["rest"].removeprefix(HUB).strip("/")
    if found["scheme"] == "file":
        return _set(where, f"/{rest}")
    name = "/".join(rest.split("/")[:2])
    return f"By its name on the Hub it is {where.partition('.')[0]}={name}."


def _windows(text: str, where: str) -> str | None:
    if found := WINDOWS.search(text):
        rest = found["rest"].replace("\\", "/")
        return f"It is a Windows path; in WSL that folder is /mnt/{found['drive'].lower()}/{rest}."
    return None


def _escaped(text: str, where: str) -> str | None:
    """A blank as a shell needs it, between quotes, where it stands for itself."""
    plain = ESCAPED.sub("", text)
    return _set(where, plain) if plain != text and absolute(plain).is_dir() else None


def _backslashes(text: str, where: str) -> str | None:
    return f"Folders are separated by /: {quoted(where + '=' + text.replace(chr(92), '/'))}." if "\\" in text else None


def _another_key(text: str, where: str) -> str | None:
    found = ANOTHER_KEY.search(text)
    return f"{found[0].strip()} is a separate argument: do not quote both together." if found else None


def _variable(text: str, where: str) -> str | None:
    if found := VARIABLE.search(text):
        return f"${found[1]} stands in it as typed: between single quotes the shell puts no value in its place."
    return None


def _user(text: str, where: str) -> str | None:
    user = next((part[1:] for part in Path(text).parts if part.startswith("~") and len(part) > 1), "")
    return f"There is no user {user}; ~/ is your own home." if user else None


def _stray(text: str, where: str) -> str | None:
    cleaned = "/".join(part.strip(STRAY) for part in text.split("/"))
    return _set(where, cleaned) if cleaned != text and absolute(cleaned).is_dir() else None


SLIPS: tuple[Callable[[str, str], str | None], ...] = (
    *(_address, _windows, _escaped, _backslashes, _another_key, _variable, _stray, _user),
)


def _set(where: str, path: str | Path) -> str:
    return f"Set {quoted(f'{where}={path}')}."


def _nearest(path: Path, where: str) -> str | None:
    near = nearest_folder(path)
    return f"Did you mean {quoted(f'{where}={near}')}?" if near else None


def nearest_folder(path: Path) -> Path | None:
    """An existing folder whose path differs by a few letters in one name."""
    known = next((folder for folder in path.parents if folder.is_dir()), None)
    if known is None:
        return None
    name, *rest = path.relative_to(known).parts
    for other in _alike(name, known):
        if (found := known.joinpath(other, *rest)).is_dir():
            return found
    return None


def _alike(name: str, folder: Path) -> Iterator[str]:
    import difflib

    try:
        names = {each.name.lower(): each.name for each in folder.iterdir() if each.is_dir()}
    except OSError:
        return
    for near in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.7):
        yield names[near]
