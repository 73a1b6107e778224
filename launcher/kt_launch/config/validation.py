"""A composed config against the schema: all mistakes at once, in our words."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kt_launch.config.schema import Config, meaning_of, read_fields
from kt_model.errors import LaunchError
from kt_model.nearest import did_you_mean, nearest_key, nearest_name

LARGEST = 2**62
"""No key accepts a larger number."""


def validate(raw: Mapping[str, Any]) -> tuple[Config, list[LaunchError]]:
    """The config, and every mistake in it; a key with a mistake gets its default, so that checking can go on."""
    mistakes: list[LaunchError] = []
    tree = _copy(raw)
    for loc in list(_endless(tree)):
        problem = f"a number of more than {LARGEST.bit_length()} bits"
        mistakes.append(LaunchError(".".join(loc), problem, "Set a smaller number."))
        _remove(tree, list(loc))
    while True:
        try:
            return Config.model_validate(tree), mistakes
        except ValidationError as failure:
            for detail in failure.errors(include_url=False):
                mistakes.append(_explain(detail["loc"], detail["type"], detail["msg"], detail.get("input")))
                _remove(tree, [str(part) for part in detail["loc"]])


def _endless(value: Any, loc: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where numbers are infinite or NaN, or larger than any computation expects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _endless(inner, (*loc, str(key)))
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield loc


def _copy(raw: Any) -> Any:
    return {key: _copy(value) for key, value in raw.items()} if isinstance(raw, Mapping) else raw


def _remove(tree: Any, loc: list[str]) -> None:
    """Remove the deepest existing part of `loc` from the tree."""
    head, *rest = loc
    inner = tree.get(head)
    if rest and isinstance(inner, dict) and rest[0] in inner:
        _remove(inner, rest)
    else:
        del tree[head]


def _explain(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> LaunchError:
    key = ".".join(str(part) for part in loc)
    known = dict(read_fields())
    if kind == "extra_forbidden":
        fix = did_you_mean(key, known, "kt-launch --help lists the keys.", nearest=nearest_key)
        return LaunchError(key, "no such key", fix)
    expected = message[0].lower() + message[1:]
    field = known.get(key) or known.get(key.rpartition(".")[0])
    if field is None:
        return LaunchError(key, f"got {spelled(value)}, but {expected}", "kt-launch --help lists the keys.")
    meant = _meant_value(field, kind, value)
    near = f"Did you mean {key}={meant}? " if meant else ""
    return LaunchError(key, f"got {spelled(value)}, but {expected}", f"{near}Meaning: {meaning_of(field)}")


def spelled(value: Any) -> str:
    """A value in a message, as it is typed: null, true, 'text', [1,2]."""
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _meant_value(field: FieldInfo, kind: str, value: Any) -> str | None:
    """The choice that a word stands for, or the list that a single value was meant to be."""
    if kind == "list_type" and value is None:
        return "[]"
    if kind == "list_type":
        return f"[{','.join(str(value).replace(',', ' ').split())}]"
    if kind != "literal_error" or not isinstance(value, str) or not value:
        return None
    choices = {str(choice).lower(): str(choice) for choice in typing.get_args(field.annotation)}
    holding = [name for name in choices if value.lower() in name]
    near = holding[0] if len(holding) == 1 else nearest_name(value.lower(), choices)
    return choices[near] if near and value.lower() != "gpu" else {"gpu": "cuda"}.get(value.lower())
