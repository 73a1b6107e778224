"""Reads kt-launch's own command line: a few flags, and key=value overrides, which are translated into Hydra's grammar.

Free text (paths, names) is used as typed, so it is quoted first: in the grammar, = , ~ ( have other meanings.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field

from kt_launch.commandline.choices import SWEEP_FUNCTION, split_list, write_out_adapters, write_out_folders
from kt_launch.commandline.suggestions import join_pieces, unknown_flag
from kt_launch.config.actions import ACTION, ACTIONS, OPERANDS
from kt_launch.config.dump import FILE_VARIABLE, read_overrides
from kt_launch.config.presets import config_folders, read_groups
from kt_launch.config.schema import Adapter, in_dictionary, is_text, is_text_list, read_fields
from kt_model.errors import LaunchError, Problems, quoted
from kt_model.user_paths import absolute, expanded

OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_$][\w.$\-]*)=(?P<value>.*)$", re.DOTALL)

OWN_MODEL = ("model.path", "model.folder", "model.hub")
FLAGS = (
    *("-h", "--help", "-m", "--multirun", "-V", "--version", "--json", "--completion", "--cfg", "--config"),
    *("-cd", "--config-dir"),
)


@dataclass
class Arguments:
    """The parsed command line."""

    overrides: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """Actions that were typed by name alone."""
    config_dir: str | None = None
    config: str | None = None
    multirun: bool = False
    help: bool = False
    version: bool = False
    completion: str = ""
    show_config: bool = False

    @property
    def action(self) -> str:
        """The action that was typed last, perhaps misspelled, or nothing."""
        typed = [word.removeprefix("action=") for word in self.overrides if word.startswith("action=")]
        typed = typed or [word for word in self.overrides if "=" not in word]
        return typed[-1] if typed else ""


def read_arguments(argv: list[str]) -> Arguments:
    """Flags and the action's name may come anywhere between the overrides; all mistakes are reported at once."""
    read, problems = Arguments(), Problems()
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        with problems.collect():
            if word.startswith("-"):
                _read_flag(read, word, waiting)
            else:
                _read_word(read, join_pieces(word, waiting))
    with problems.collect():
        _check_one_action(read)
    with problems.collect():
        _check_one_lora(read)
    problems.raise_if_any()
    _give_operands(read)
    written_out = _written_out(read)
    read.overrides = [quote_text(override, read.multirun) for override in written_out]
    os.environ.pop(FILE_VARIABLE, None)
    if read.config is not None:
        file = absolute(read.config)
        read.overrides = [*read_overrides(file, written_out), *read.overrides]
        os.environ[FILE_VARIABLE] = str(file)
    return read


def _written_out(read: Arguments) -> list[str]:
    """The overrides, with lists of adapters and folders turned into presets. A model folder of the user's own is
    composed without the demo's model and adapter."""
    options = functools.cache(lambda: read_groups(config_folders(read.config_dir)))
    words = [one for override in read.overrides for one in write_out_adapters(override)]
    words = [write_out_folders(word, lambda group: options().get(group, []), read.multirun) for word in words]
    keys = {word.partition("=")[0] for word in words}
    if read.config is None and "model" not in keys:
        if keys & set(OWN_MODEL):
            return ["model=auto", *words]
        if "lora.path" in keys and "lora" not in keys:
            return ["lora=none", *words]
    return words


def _read_word(read: Arguments, word: str) -> None:
    """An action's name, a page, or an override."""
    if word == "help":
        read.help = True
    elif word == "version":
        read.version = True
    elif word in ACTIONS:
        read.words.append(word)
        if f"{ACTION}={word}" not in read.overrides:
            read.overrides.append(f"{ACTION}={word}")
    else:
        read.overrides.append(word)


def _give_operands(read: Arguments) -> None:
    """Words that belong to their action become the value of its key: `logs NAME` is run=NAME."""
    action = read.words[0] if read.words else ""
    words = [word for word in read.overrides if re.fullmatch(r"[\w./~-]+", word)]
    if words and not read.help and action in OPERANDS and (len(words) == 1 or "[" in OPERANDS[action]):
        read.overrides = [word for word in read.overrides if word not in words]
        read.overrides.append(OPERANDS[action].format(",".join(words)))


def _check_one_action(read: Arguments) -> None:
    """Raise LaunchError if two words, or a word and action=..., name different actions."""
    typed = list(dict.fromkeys(word for word in read.overrides if word.startswith(f"{ACTION}=")))
    if read.words and len(typed) > 1:
        named = list(dict.fromkeys(read.words))
        named += [word for word in typed if word.removeprefix(f"{ACTION}=") not in read.words]
        raise LaunchError(ACTION, f"{' and '.join(named)} are typed, but one is expected", "Leave the others out.")


def _check_one_lora(read: Arguments) -> None:
    """Raise LaunchError for several `lora=`, of which the last one alone would count: whoever types two wants both.
    Adapters that are switched on or off again by `lora=none` are not meant."""
    typed = list(dict.fromkeys(word.partition("=")[2] for word in read.overrides if word.startswith("lora=")))
    if len(typed) < 2 or "none" in typed:
        return
    both = ",".join(value.removeprefix("[").removesuffix("]") for value in typed)
    problem = f"{' and '.join(typed)} are typed, and the last one alone would be served"
    fix = f"Set {quoted(f'lora=[{both}]')} for {'both' if len(typed) == 2 else 'all'}, or leave out what is not meant."
    raise LaunchError("lora", problem, fix)


def _read_flag(read: Arguments, word: str, waiting: list[str]) -> None:
    flag, has_value, value = word.partition("=")
    if flag in ("-h", "--help"):
        read.help = True
    elif flag in ("-m", "--multirun"):
        read.multirun = True
    elif flag == "--json":
        read.overrides.append("format=json")
    elif flag in ("-V", "--version"):
        read.version = True
    elif flag in ("-cd", "--config-dir"):
        read.config_dir = value if has_value else _next_word(flag, waiting, "a folder")
    elif flag == "--config":
        read.config = value if has_value else _next_word(flag, waiting, "a file of kt-launch config")
    elif flag == "--completion":
        read.completion = value if has_value else _next_word(flag, waiting, "bash, zsh or fish")
    elif flag in ("-c", "--cfg"):
        read.show_config = True
        if waiting and waiting[0] in ("job", "hydra", "all"):
            waiting.pop(0)
    else:
        if not has_value and waiting and "=" not in waiting[0] and not waiting[0].startswith("-"):
            value = waiting.pop(0)
        raise unknown_flag(flag, value or None, FLAGS)


def _next_word(flag: str, waiting: list[str], expected: str) -> str:
    if not waiting:
        raise LaunchError(flag, f"{expected} is expected after it", "kt-launch --help shows how.")
    return waiting.pop(0)


def quote_text(override: str, multirun: bool) -> str:
    """`model.path=/a b,c` in Hydra's grammar; a dictionary's key gets the prefix that lets it be new."""
    match = OVERRIDE.match(override)
    if match is None:
        return override
    sign = "++" if in_dictionary(match["key"]) else match["sign"]
    value = match["value"]
    if _takes_text(match["key"]):
        value = _quote_value(value, multirun)
    elif _takes_texts(match["key"]) and all(map(_is_list, lists := split_list(value))):
        value = ",".join(map(_quote_list, lists))
    return f"{sign}{match['key']}={value}"


def _quote_value(value: str, multirun: bool) -> str:
    if _is_in_grammar(value):
        return value
    if multirun and SWEEP_FUNCTION.match(value):
        return value
    if multirun and "," in value and not expanded(value).exists():
        return ",".join(_quote_item(part) for part in value.split(","))
    return _quote(value)


def _is_list(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")


def _quote_list(text: str) -> str:
    return f"[{','.join(_quote_item(item) for item in split_list(text[1:-1]))}]"


def _quote_item(item: str) -> str:
    return item if _is_in_grammar(item) else _quote(item)


def _is_in_grammar(value: str) -> bool:
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    return value == "" or value.lower() == "null" or value.startswith("${") or quoted


def _quote(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _takes_text(key: str) -> bool:
    fields = dict(read_fields())
    if key in fields:
        return is_text(fields[key])
    section, _, leaf = key.rpartition(".")
    if section in fields:
        return fields[section].annotation == dict[str, str]
    return in_dictionary(key) and leaf in Adapter.model_fields


def _takes_texts(key: str) -> bool:
    return any(name == key and is_text_list(field) for name, field in read_fields())
