"""The name that a user probably meant, out of the known names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def nearest_name(typed: str, names: Iterable[str]) -> str | None:
    """The closest of `names`, also when only the last part of a dotted key was typed."""
    candidates = list(names)
    exact_tail = [name for name in candidates if name.rpartition(".")[2] == typed]
    if exact_tail:
        return exact_tail[0]
    close = difflib.get_close_matches(typed, candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    tails = {name.rpartition(".")[2]: name for name in candidates}
    close = difflib.get_close_matches(typed.rpartition(".")[2], tails, n=1, cutoff=0.75)
    return tails[close[0]] if close else None


def nearest_key(typed: str, keys: Iterable[str]) -> str | None:
    """The closest dotted key; one of the same last part in another section goes first, if there is only one."""
    known = list(keys)
    elsewhere = [key for key in known if key.rpartition(".")[2] == typed.rpartition(".")[2]]
    return elsewhere[0] if len(elsewhere) == 1 else nearest_name(typed, known)


Nearest = Callable[[str, Iterable[str]], str | None]


def did_you_mean(
    typed: str, names: Iterable[str], otherwise: str, before: str = "", nearest: Nearest = nearest_name
) -> str:
    """The question with the closest name and what is typed before it; `otherwise` if none is close."""
    near = nearest(typed, names)
    return f"Did you mean {before}{near}?" if near else otherwise
