"""Completion scripts for bash, zsh and fish, with all words in them: completing starts no Python.

A script made with --config-dir knows the user's own presets too; make it again when presets are added.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args, get_origin

from kt_launch.commandline.arguments import FLAGS
from kt_launch.config.actions import ACTIONS, PAGES
from kt_launch.config.presets import shown_options
from kt_launch.config.schema import read_fields
from kt_launch.config.typedfolders import PACKAGES
from kt_model.errors import LaunchError
from kt_model.nearest import nearest_name

BASH = """\
# kt-launch completion for bash
_kt_launch() {{
    local word="${{COMP_LINE:0:COMP_POINT}}"
    word="${{word##* }}"
    COMPREPLY=($(compgen -W {words} -- "$word"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
    if [[ $word == *=* ]]; then
        local head="${{word%"${{word##*[=:]}}"}}"
        COMPREPLY=("${{COMPREPLY[@]#"$head"}}")
        [[ ${{#COMPREPLY[@]}} -eq 0 ]] && COMPREPLY=($(compgen -f -- "${{word#"$head"}}"))
    fi
}}
complete -o bashdefault -F _kt_launch kt-launch
"""

ZSH = """\
#compdef kt-launch
# kt-launch completion for zsh
_kt_launch() {{
    local -a whole open
    whole=({whole})
    open=({open})
    compadd -- $whole
    if [[ $PREFIX == *=* && " ${{open[*]}} " == *" ${{PREFIX%%=*}}= "* ]]; then
        compset -P '*='
        _files
    else
        compadd -S '' -- $open
    fi
}}
compdef _kt_launch kt-launch
"""

FISH = """\
# kt-launch completion for fish
complete -c kt-launch -e
complete -c kt-launch -n 'not string match -q "*=*" -- (commandline -ct)' -f
complete -c kt-launch -a {words}
"""


def completion_words(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """What may be typed: flags, actions, choices of presets, keys; a key whose values are known comes with each."""
    words = [*FLAGS, *ACTIONS, *PAGES]
    for group, options in groups.items():
        words += [f"{group}={option}" for option in shown_options(options)]
        words += [f"{group}="] if group in PACKAGES else []
    for key, field in read_fields():
        if get_origin(field.annotation) is Literal:
            words += [f"{key}={value}" for value in get_args(field.annotation)]
        elif field.annotation is bool:
            words += [f"{key}=true", f"{key}=false"]
        elif key == "key":
            words += [f"key={name}" for name, _ in read_fields()]
        elif key not in ("action.name", "lora.adapters"):
            words.append(f"{key}=")
    return words


def _bash(words: list[str]) -> str:
    return BASH.format(words=shlex.quote(" ".join(words)))


def _zsh(words: list[str]) -> str:
    whole = " ".join(word for word in words if not word.endswith("="))
    return ZSH.format(whole=whole, open=" ".join(word for word in words if word.endswith("=")))


def _fish(words: list[str]) -> str:
    return FISH.format(words=shlex.quote(" ".join(words)))


SHELLS: Mapping[str, Callable[[list[str]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def completion_script(shell: str, groups: Mapping[str, Sequence[str]]) -> str:
    """The script of one shell."""
    if shell not in SHELLS:
        near = nearest_name(shell, SHELLS)
        fix = f"Did you mean {near}?" if near else f"Choose from {', '.join(SHELLS)}."
        raise LaunchError("--completion", f"no script for {shell}", fix)
    return SHELLS[shell](completion_words(groups))
