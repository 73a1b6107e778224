"""Resolves a recorded config again: the current command and environment, with every value that the config leaves open
set to what the plan resolved then. So a replay starts nothing that a config could not give, whatever the plan's file
says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kt_launch.config.schema import Config, read_fields
from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import read_host
from kt_launch.planning.resolve import resolve
from kt_model.errors import LaunchErrors, Problems
from kt_model.plan import SERVER_COMMAND, LaunchPlan

SECTIONS = ("model", "lora", "kt", "server", "proof", "paths")
"""Sections of a recorded config that a plan is made from."""
OPEN = (None, "auto")
Difference = tuple[str, str, str]
"""What differs, its value in the plan, its value when the config is resolved today."""


def recorded_config(plan: LaunchPlan) -> Config:
    """The config of a recorded plan. Raises LaunchErrors."""
    config, mistakes = validate({name: plan.config[name] for name in SECTIONS if name in plan.config})
    if mistakes:
        raise LaunchErrors(mistakes)
    return config


def replan(plan: LaunchPlan) -> LaunchPlan:
    """The plan that its config gives today. Does not check whether the port is free or memory suffices. Raises
    LaunchErrors for what can no longer be planned."""
    problems = Problems()
    config = _closed(recorded_config(plan), plan)
    facts = read_facts(config, Sources(), problems, read_host())
    port = replace(facts.port, number=plan.value("server.port"), free=True)
    again = resolve(config, replace(facts, port=port, metrics_port=None), Sources(), problems)
    problems.raise_if_any()
    return again


def command_differences(plan: LaunchPlan, again: LaunchPlan) -> list[Difference]:
    """Differences in the arguments after the interpreter, and in the environment; one row each."""
    rows = [*_rows("argument", _by_flag(plan), _by_flag(again)), *_rows("environment", plan.env, again.env)]
    same_words = plan.argv[1:] == again.argv[1:]
    return rows if rows or same_words else [("arguments", "another order", "the usual one")]


def _closed(config: Config, plan: LaunchPlan) -> Config:
    """The config with open values set to the plan's, adapters named by their folders, and any memory fit accepted."""
    tree = config.model_dump(mode="json")
    for key, _ in read_fields():
        section, _, name = key.partition(".")
        inner = tree.get(section)
        if key in plan.resolved and isinstance(inner, dict) and _is_open(key, inner.get(name)):
            inner[name] = plan.value(key)
    adapters, lora = config.lora.adapters, tree["lora"]
    layouts = {name: adapters[name].layout if name in adapters else None for name in plan.adapters}
    lora["adapters"] = {name: {"path": path, "layout": layouts[name]} for name, path in plan.adapters.items()}
    lora["path"] = lora["name"] = None
    tree["server"]["fit"] = "warn"
    closed, mistakes = validate(tree)
    if mistakes:
        raise LaunchErrors(mistakes)
    return closed


def _is_open(key: str, value: Any) -> bool:
    """Whether planning resolves the value. server.cuda_graph follows from other keys, so it is never fixed here."""
    return key != "server.cuda_graph" and (value in OPEN or (key == "server.port" and value == 0))


def _by_flag(plan: LaunchPlan) -> dict[str, str]:
    """Flag -> its words; a repeated flag has the words of all its uses."""
    found: dict[str, str] = {}
    flag = ""
    for word in plan.argv[1 + len(SERVER_COMMAND) :]:
        if word.startswith("--"):
            flag = word
            found[flag] = f"{found[flag]} and again" if flag in found else ""
        else:
            found[flag] = f"{found.get(flag, '')} {word}".strip()
    return found


def _rows(kind: str, then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys([*then, *now]):
        left, right = then.get(name), now.get(name)
        if left != right:
            yield f"{kind} {name}", _shown(left), _shown(right)


def _shown(words: str | None) -> str:
    return "absent" if words is None else words or "given"
