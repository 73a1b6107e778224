"""The page that kt-launch --help shows: examples, actions, groups with their choices, keys with their help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kt_launch.config.actions import ACTIONS, PAGES
from kt_launch.config.presets import shown_options
from kt_launch.config.schema import meaning_of, read_fields

EXAMPLES = """\
kt-launch serves a Mixture-of-Experts checkpoint and its LoRA adapters on stock SGLang, with the routed experts on the \
CPU.

Usage: kt-launch [action] [flags] [group=choice] [key=value] ...

  kt-launch                            serve the shipped demo and its adapter
  kt-launch model=/checkpoint          serve any checkpoint of a known family
  kt-launch model=/checkpoint lora=/adapter
                                       with an adapter, named by its folder
  kt-launch model=deepseek_v2_lite lora=[west_all,/other] kt.cpuinfer=48
                                       presets and a folder, with 48 threads
  kt-launch chat                       talk to the server that runs, or the demo
  kt-launch plan model=deepseek_v2_lite
                                       what would be started, and why
  kt-launch plan --json                the same as one JSON object
  kt-launch plan -m model=demo lora=none,demo_west
                                       one after another
  kt-launch bench -m kt.cpuinfer=8,16  measure each, with a report at the end

Requests name the base model (demo) or one of its adapters (demo:west).

Flags:
  -h, --help           this page; with an action, that action's page
  -m, --multirun       run every combination of comma-separated choices
  --config-dir FOLDER  search FOLDER first for presets: adds choices, and overrides shipped ones (also \
KT_LAUNCH_CONFIG_DIR)
  --config FILE        start from a file that kt-launch config printed, with the overrides on top
  --json               print JSON (format=json), with actions that print data
  --completion SHELL   print a completion script for bash, zsh or fish:
                       source <(kt-launch --completion bash)
  --cfg job            print the composed config and stop
  -V, --version        print the version

Environment:
  KT_LAUNCH_MODELS, KT_LAUNCH_LORAS  roots of presets' folders
  KT_LAUNCH_RUNS                     where runs are recorded
  KT_LAUNCH_CACHE                    where packed and quantized experts are kept
  KT_LAUNCH_CONFIG_DIR               presets of your own
  NO_COLOR                           no bold and no colours

Exit codes: 0 success, 2 a configuration error, 3 the server did not start, 4 the proof failed, 5 a bench could not \
measure, 124 a bench timed out or a server hung, 130 interrupted; a multirun exits with the worst code of its jobs.
"""


def help_page(groups: Mapping[str, Sequence[str]]) -> str:
    """The whole page; groups come from the composer, so that the user's own presets are listed too."""
    actions = [f"  {name:<12} {summary}" for name, summary in (*ACTIONS.items(), *PAGES.items())]
    own = {name: shown_options(options) for name, options in groups.items() if name != "action"}
    choices = [f"  {name + '=':<10} {' | '.join(options)}" for name, options in own.items()]
    keys = [f"  {key:<30} {meaning_of(field)}" for key, field in read_fields() if key != "action.name"]
    same = "Actions (kt-launch NAME and kt-launch action=NAME are the same):"
    return "\n".join([EXAMPLES, same, *actions, "", "Groups and their choices:", *choices, "", "Keys:", *keys])
