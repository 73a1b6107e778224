"""Checks the functions of a sweep before its first job: glob(…) is written out, because it chooses among names that we
know and Hydra does not, and functions that give no values or too many are refused.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.types import Glob, Override, RangeSweep

from kt_launch.config.presets import shown_options
from kt_launch.config.schema import read_fields
from kt_model.errors import LaunchError

MOST_VALUES = 10_000
"""Of one key; a sweep with more jobs is a typing mistake."""


def write_out_glob(override: Override, text: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Replaces a glob(…) by the choices that it matches; leaves every other override as it is. Raises LaunchError."""
    chosen = override.value()
    if not isinstance(chosen, Glob):
        return text
    key = override.key_or_group
    names = _names_of(key, groups)
    if names is None:
        problem = "glob chooses among presets or known values, but this key takes any value"
        raise LaunchError(key, problem, f"Set {key}=<one>,<another>.")
    if not (found := chosen.filter(names)):
        problem = f"{text.partition('=')[2]} matches nothing, expected one of {', '.join(names)}"
        raise LaunchError(key, problem, f"Set {key}=glob(*) for all of them.")
    return f"{text.partition('=')[0]}={','.join(found)}"


def require_values(override: Override, text: str) -> None:
    """Raise LaunchError if a range is empty, or has more values than anybody would run."""
    sweep = override.value()
    if not isinstance(sweep, RangeSweep):
        return
    key, _, typed = text.partition("=")
    if not sweep.step:
        raise LaunchError(key, f"{typed} has steps of 0", f"Set {key}=range(<first>,<end>).")
    count = sum(1 for _ in itertools.islice(sweep.range(), MOST_VALUES + 1))
    if not count:
        problem = f"{typed} has no values: it counts from the first number up to, but not including, the second"
        raise LaunchError(key, problem, f"Set {key}=<one>,<another>.")
    if count > MOST_VALUES:
        raise LaunchError(key, f"{typed} has more than {MOST_VALUES} values", f"Set {key}=range(<first>,<end>,<step>).")


def _names_of(key: str, groups: Mapping[str, Sequence[str]]) -> list[str] | None:
    """The presets of a group, or all values that a key can have if they are few."""
    if key in groups:
        return shown_options(groups[key])
    field = dict(read_fields()).get(key)
    if field is None:
        return None
    if field.annotation is bool:
        return ["true", "false"]
    literal = typing.get_origin(field.annotation) is typing.Literal
    return [str(value) for value in typing.get_args(field.annotation)] if literal else None
