"""Overrides that mean nothing here, and what was probably meant: keys, groups, presets, several values."""

from __future__ import annotations

from kt_launch.config.actions import ACTIONS, PAGES
from kt_launch.config.folder_presets import PACKAGES, below_root
from kt_launch.config.presets import shown_options
from kt_launch.config.schema import in_dictionary, is_list, read_fields
from kt_model.errors import LaunchError, quoted
from kt_model.nearest import did_you_mean, nearest_key, nearest_name
from kt_model.user_paths import slip_in

OTHER_WORDS = {
    **dict.fromkeys(("start", "launch", "up"), "serve"),
    **dict.fromkeys(("list", "ls", "ps"), "runs"),
    **dict.fromkeys(("kill", "down", "end"), "stop"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
}
"""What other programs call these actions."""


def meant_word(text: str) -> str:
    """What to type instead of a word that is neither an action nor key=value."""
    key, _, value = text.partition(":")
    if value and (is_known(key) or key in PACKAGES):
        return f"Set {quoted(f'{key}={value}')}."
    if text.endswith((".yaml", ".yml")):
        return f"Did you mean --config {text}?"
    if "/" in text:
        return f"For a model of your own set {quoted(f'model={text}')}."
    if text in OTHER_WORDS:
        return f"Did you mean kt-launch {OTHER_WORDS[text]}?"
    return did_you_mean(text, (*ACTIONS, *PAGES), "kt-launch --help shows examples.", "kt-launch ")


def meant_override(text: str) -> str | None:
    """What to type instead of a key=value with misplaced quotes or a stray comma."""
    key, _, value = text.partition("=")
    if text[0] in "'\"" and text[-1] == text[0]:
        return f"Leave the quotes out: {text[1:-1]}"
    if " " in key.strip():
        return f"Put no quotes around several words: kt-launch {text}"
    return f"Set {quoted(f'{key}={value[:-1]}')}." if value.endswith(",") and "," not in value[:-1] else None


def refuse_sweep(text: str) -> LaunchError:
    """Several values without -m."""
    key, _, value = text.partition("=")
    if is_list(key) and not value.startswith("["):
        return LaunchError(key, f"{value} are several values, but one list is expected", f"Set {key}=[{value}].")
    list_form = f", or set {key}=[{value}] for both" if key == "lora" else ""
    problem = f"{value} are several values, but a single launch takes one"
    return LaunchError(key, problem, f"Add -m to run one after another{list_form}.")


def meant_name(typed: str, groups: dict[str, list[str]]) -> str | None:
    """The key or group that was probably meant, known or not; a group, also with an extra s, comes first."""
    typed = typed.lower()
    near = [name for name in groups if name in (typed, typed.removesuffix("s"))]
    return near[0] if near else nearest_key(typed, [*groups, *(name for name, _ in read_fields())])


TRAINED = (
    *("alpha", "lora_alpha", "r", "lora_r", "lora_rank", "scale", "scaling", "bias", "dropout", "lora_dropout"),
    *("use_rslora", "rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"),
)
"""What training tools call the settings of an adapter, which are in its adapter_config.json."""


def unknown_name(key: str, text: str, groups: dict[str, list[str]]) -> LaunchError:
    """The override `text` of a key or group that does not exist."""
    group, _, name = key.lower().rpartition(".")
    if name in TRAINED and group in ("", "lora"):
        fix = "Leave it out: an adapter is served with what its adapter_config.json says."
        return LaunchError(key, "no such key or group", fix)
    near, value = meant_name(key, groups), text.partition("=")[2]
    fix = f"Did you mean {near}={value}?" if near else "kt-launch --help lists them."
    return LaunchError(key, "no such key or group", fix)


def instead_of_deleting(key: str) -> str:
    """A key that is null when it is not given can be set to that."""
    field = dict(read_fields()).get(key)
    return "Leave it out." if field is None or field.default is not None else f"Leave it out, or set {key}=null."


def is_known(key: str) -> bool:
    """Whether it is a key, a section of keys, or of a dictionary whose names the user chooses."""
    return any(name == key for name, _ in read_fields()) or is_section(key) or in_dictionary(key)


def is_section(key: str) -> bool:
    """Whether there are keys below it."""
    return any(name.startswith(f"{key}.") for name, _ in read_fields())


def refuse_section(key: str, text: str) -> LaunchError:
    """A value for a section of keys."""
    inside = [name for name, _ in read_fields() if name.startswith(f"{key}.")]
    value = text.partition("=")[2]
    fix = f"Did you mean {inside[0]}={value}?" if len(inside) == 1 else f"Its keys are {', '.join(inside)}."
    return LaunchError(key, "it is a section of keys and has no value itself", fix)


def unknown_option(group: str, option: str, options: list[str]) -> LaunchError:
    """A preset that is none of the group's options; '' if none was given."""
    shown = shown_options(options)
    expected = f", expected one of {', '.join(shown)}" if shown else ""
    problem = f"no preset {f'named {option}' if option else 'given'}{expected}"
    if group.startswith("hydra/"):
        problem = f"no engine {option} is installed, expected one of {', '.join(shown)}"
        fix = "Install those of Optuna, Ray and submitit with pip install 'kt-launch[sweep]'."
        return LaunchError(group, problem, fix)
    near = nearest_name(option, shown)
    if not option:
        unset = ", or leave it out; a shell's variable that is not set gives nothing"
        return LaunchError(group, problem, f"Set {group}=<one of them>{unset}.")
    if group in PACKAGES and (slip := slip_in(option, group)):
        return LaunchError(group, f"{option} is neither a preset nor a folder here", slip)
    if folder := below_root(group, option):
        return LaunchError(group, problem, f"Did you mean {quoted(f'{group}={folder}')}?")
    if near:
        return LaunchError(group, problem, f"Did you mean {group}={near}?")
    if group in PACKAGES:
        return LaunchError(group, problem, f"For a folder of your own set {group}=/path/to/{option}.")
    own = f"<folder>/{group}/{option}.yaml with --config-dir <folder>"
    return LaunchError(group, problem, f"Your own presets go into {own}.")
