"""Completion scripts for bash, zsh and fish that contain all words: completing starts no Python. Names of runs, and
presets of --config-dir or KT_LAUNCH_CONFIG_DIR, are looked up by the shell itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from kt_launch.commandline.arguments import FLAGS
from kt_launch.config.actions import ACTIONS, OPERANDS, PAGES
from kt_launch.config.folder_presets import PACKAGES
from kt_launch.config.presets import shown_options
from kt_launch.config.schema import read_fields, values_of
from kt_model.errors import LaunchError
from kt_model.nearest import did_you_mean

ABOUT_RUNS = "|".join(name for name, value in OPERANDS.items() if value.startswith("run"))
"""Actions after which a run is named without its key."""
BASH = """\
# kt-launch completion for bash
_kt_launch() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" dir="$KT_LAUNCH_CONFIG_DIR" words={words} file name one keys=""
    local word="${{line##* }}"
    [[ $line =~ (-cd|--config-dir)[\\ =]([^\\ ]+) ]] && dir="${{BASH_REMATCH[2]/#\\~/$HOME}}"
    for file in ${{dir:+"$dir"/*/*.yaml}}; do
        name="${{file%/*}}"
        [[ -e $file ]] && one="${{file##*/}}" && words+=" ${{name##*/}}=${{one%.yaml}}"
    done
    local start=""
    [[ $word == run=* || $word == runs=* ]] && start="${{word%%=*}}="
    if [[ -n $start || ( $word != *=* && $line =~ " "({about_runs})" " ) ]]; then
        for file in "${{KT_LAUNCH_RUNS:-${{XDG_STATE_HOME:-$HOME/.local/state}}/kt-launch/runs}}"/*/plan.json; do
            name="${{file%/plan.json}}"
            [[ -e $file ]] && words+=" $start${{name##*/}}"
        done
    fi
    if [[ $word != *=* && $line =~ " explain "[^\\ ]*$ ]]; then
        for one in $words; do [[ $one == key=* ]] && keys+=" ${{one#key=}}"; done
        words="$keys"
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ $word =~ ^([a-z_.]+=)\\[(.*,)?([^,]*)$ ]]; then
        for one in $words; do
            [[ $one == "${{BASH_REMATCH[1]}}${{BASH_REMATCH[3]}}"?* ]] &&
                COMPREPLY+=("${{BASH_REMATCH[1]}}[${{BASH_REMATCH[2]}}${{one#*=}}")
        done
    fi
    [[ ${{#COMPREPLY[@]}} -eq 1 && ( ${{COMPREPLY[0]}} == *= || $word == *=\\[* ) ]] && compopt -o nospace
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
    local -a whole open own items
    setopt local_options extended_glob
    local dir=$KT_LAUNCH_CONFIG_DIR file word key=${{PREFIX%%=*}}
    whole=({whole})
    open=({open})
    [[ $BUFFER =~ '(-cd|--config-dir)[ =]([^ ]+)' ]] && dir=${{match[2]/#\\~/$HOME}}
    [[ -n $dir ]] && for file in $dir/*/*.yaml(N); do whole+=("${{file:h:t}}=${{file:t:r}}"); done
    local start=
    [[ $PREFIX == run(s|)=* ]] && start="${{PREFIX%%=*}}="
    if [[ -n $start || ( $PREFIX != *=* && $BUFFER =~ ' ({about_runs}) ' ) ]]; then
        for file in ${{KT_LAUNCH_RUNS:-${{XDG_STATE_HOME:-$HOME/.local/state}}/kt-launch/runs}}/*/plan.json(N); do
            whole+=("$start${{file:h:t}}")
        done
    fi
    if [[ $PREFIX != *=* && $BUFFER =~ ' explain [^ ]*$' ]]; then
        compadd -- ${{${{(M)whole:#key=*}}#key=}}
        return
    fi
    compadd -- $whole
    if [[ ${{PREFIX//\\\\/}} == [a-z_.]##=\\[* ]]; then
        compset -P '*[,\\[]'
        for word in ${{(M)whole:#${{key}}=*}}; do items+=("${{word#*=}}"); done
        compadd -S '' -- $items
    elif [[ $PREFIX == *=* && " ${{open[*]}} " == *" ${{PREFIX%%=*}}= "* ]]; then
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
set -g __kt_launch_words {each}
function __kt_launch_own
    set -l line (commandline -p)
    set -l token (commandline -ct)
    set -l words $__kt_launch_words
    set -l dir $KT_LAUNCH_CONFIG_DIR
    set -l found (string match -r -- '(?:-cd|--config-dir)[ =](\\S+)' "$line")
    and set dir (string replace -r '^~' $HOME -- $found[2])
    if test -n "$dir"
        for file in $dir/*/*.yaml
            set -a words (string replace -r '.*/([^/]+)/([^/]+)\\.yaml$' '$1=$2' -- $file)
        end
    end
    set -l start (string match -r '^runs?=' -- $token; or echo)
    set -l about (string match -r ' ({about_runs}) ' -- $line)
    if test -n "$start"; or begin; test -n "$about"; and not string match -q '*=*' -- $token; end
        set -l state $XDG_STATE_HOME
        test -n "$state"; or set state $HOME/.local/state
        set -l runs $KT_LAUNCH_RUNS
        test -n "$runs"; or set runs $state/kt-launch/runs
        for file in $runs/*/plan.json
            set -a words $start(string replace -r '.*/([^/]+)/plan.json$' '$1' -- $file)
        end
    end
    if string match -qr -- ' explain [^ =]*$' "$line"
        set words (string replace -rf '^key=' '' -- $words)
    end
    set -l parts (string match -r -- '^([a-z_.]+=)\\[((?:.*,)?)([^,]*)$' "$token")
    if test (count $parts) -gt 1
        for word in $words
            string match -q -- "$parts[2]?*" $word
            and echo $parts[2]"["$parts[3](string replace -- $parts[2] '' $word)
        end
    end
    string join \\n -- $words
end
complete -c kt-launch -e
complete -c kt-launch -n 'not string match -q "*=*" -- (commandline -ct)' -f
complete -c kt-launch -a '(__kt_launch_own)'
"""


def completion_words(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """What may be typed: flags, actions, choices of presets, keys; a key with known values comes once with each."""
    words = [*FLAGS, *ACTIONS, *PAGES]
    for group, options in groups.items():
        words += [f"{group}={option}" for option in shown_options(options)]
        words += [f"{group}="] if group in PACKAGES else []
    for key, field in read_fields():
        if values := values_of(field):
            words += [f"{key}={value}" for value in values]
        elif key == "key":
            words += [f"key={name}" for name, _ in read_fields()]
        elif key not in ("action.name", "lora.adapters"):
            words.append(f"{key}=")
    return words


SHELLS: Mapping[str, str] = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def completion_script(shell: str, groups: Mapping[str, Sequence[str]]) -> str:
    """The script of one shell; each template uses the forms of the words that it needs."""
    if shell not in SHELLS:
        fix = did_you_mean(shell, SHELLS, f"Choose from {', '.join(SHELLS)}.")
        raise LaunchError("--completion", f"no script for {shell}", fix)
    words = completion_words(groups)
    return SHELLS[shell].format(
        about_runs=ABOUT_RUNS,
        words=shlex.quote(" ".join(words)),
        each=" ".join(map(shlex.quote, words)),
        whole=" ".join(word for word in words if not word.endswith("=")),
        open=" ".join(word for word in words if word.endswith("=")),
    )
