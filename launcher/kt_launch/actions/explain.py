"""action=explain: a key's value, where it came from, the rule behind it, and what would change it. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Data, Page
from kt_launch.commandline.terminal import WHOLE, folded, print_table, show_value
from kt_launch.config.schema import Adapter, Config, is_open, meaning_of, read_fields, values_of
from kt_launch.gathering.facts import prepare
from kt_launch.planning.rules import RULES, rule_of
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.nearest import did_you_mean, nearest_key
from kt_model.plan import LaunchPlan
from kt_model.printable import say

PAGE = Page(
    (
        "Explains one key, or all of them: the value in this launch, its source and meaning, the rule that applies "
        "when it is not given, and what would change it.",
    ),
    (
        ("kt-launch explain kt.cpuinfer", "one key"),
        ("kt-launch explain kt.weight_path kt.method=int8", "with other settings"),
        ("kt-launch explain lora.west", "every key that begins with it, also those that only the plan has"),
        ("kt-launch explain", "all of them"),
    ),
    ("key", *LAUNCH_KEYS, "format"),
    picture=True,
    data=Data(
        "a list with an object for each key",
        (
            ("key", "its name"),
            ("value", "in this launch; null where it has none"),
            ("source", "where that came from"),
            ("meaning", "what it is"),
            ("rule", "what applies when it is not given"),
            ("default", "of the schema; null where it has none"),
            ("changes", "what would change it, or nothing"),
        ),
    ),
)

DEFAULT_RULE = "the command line; else a preset; else the default"


@dataclass(frozen=True)
class Entry:
    """One key of the config, of the plan, or of both."""

    key: str
    value: Any
    source: str
    field: FieldInfo | None
    """The key as it can be typed."""

    @property
    def shown(self) -> str:
        return show_value(self.value)

    @property
    def meaning(self) -> str:
        rule = rule_of(self.key)
        if self.field is not None:
            return meaning_of(self.field)
        return rule.how if rule else ""


def run(job: Job) -> None:
    job.problems.raise_if_any()
    plan, failure = _plan_or_failure(job)
    key, entries = job.config.key or None, {entry.key: entry for entry in _entries(job, plan)}
    inside = [entry for entry in entries.values() if key is None or entry.key.startswith(f"{key}.")]
    if key is not None and key not in entries and not inside:
        raise _unknown(key, list(entries))
    if job.wants_json:
        chosen = [entries[key]] if key in entries else []
        job.print_json([_plain(entry) for entry in [*chosen, *inside]])
        return
    if key in entries:
        say(folded(_explain(entries[key]), WHOLE), kept="\n")
    if inside:
        print(end="\n" if key in entries else "")
        rows = [(entry.key, entry.shown, entry.source, entry.meaning) for entry in inside]
        print_table(("key", "value", "source", "meaning"), rows)
    for mistake in failure.errors if failure else []:
        say(f"\nnot resolved yet, because of {mistake}")


def _plan_or_failure(job: Job) -> tuple[LaunchPlan | None, LaunchErrors | None]:
    """A config with mistakes can still be explained."""
    try:
        return prepare(job.config, job.sources, job.problems), None
    except LaunchErrors as failure:
        return None, failure


def _entries(job: Job, plan: LaunchPlan | None) -> Iterator[Entry]:
    """Every key: those of the config, with the plan's values if it has them, then those that only a plan has."""
    resolved = dict(plan.resolved) if plan else {}
    for key, field, value in _typed(job.config):
        if item := resolved.pop(key, None):
            yield Entry(key, item.value, item.source, field)
        else:
            yield Entry(key, value, _source(job, key, field), field)
    for key, item in resolved.items():
        yield Entry(key, item.value, item.source, None)
    for key in _keys_of_rules(job.config):
        if key not in resolved and key not in dict(read_fields()):
            yield Entry(key, None, "not in this plan", None)


def _source(job: Job, key: str, field: FieldInfo) -> str:
    """Where a value comes from; for a dictionary, where its entries do."""
    if not is_open(field):
        return job.sources.of(key)
    entries = [each for each, _, _ in _typed(job.config) if each.startswith(f"{key}.")]
    found = dict.fromkeys(job.sources.of(entry) for entry in entries)
    return ", ".join(source for source in found if source != "default") or job.sources.of(key)


def _typed(config: Config) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Keys of the config with their values; for a dictionary its names, then the keys of each."""
    for key, field in read_fields():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if not is_open(field):
            yield key, field, value
            continue
        yield key, field, ", ".join(value) or None
        for name, adapter in value.items():
            for leaf, own in Adapter.model_fields.items():
                yield f"{key}.{name}.{leaf}", own, getattr(adapter, leaf)


def _keys_of_rules(config: Config) -> Iterator[str]:
    """Keys that a plan can have, with those of adapters under the names in the config."""
    names = [*config.lora.adapters, *filter(None, [config.lora.name])]
    for key in RULES:
        yield from (key.replace("*", name) for name in names) if "*" in key else (key,)


def _unknown(key: str, known: Sequence[str]) -> LaunchError:
    groups = {name.rpartition(".")[0] for name in known if "." in name}
    otherwise = "kt-launch explain lists all keys."
    fix = did_you_mean(key, [*known, *sorted(groups)], otherwise, "kt-launch explain ", nearest_key)
    return LaunchError("key", f"no key {key}", fix)


def _plain(entry: Entry) -> dict[str, Any]:
    rule = rule_of(entry.key)
    return {
        "key": entry.key,
        "value": entry.value,
        "source": entry.source,
        "meaning": entry.meaning,
        "rule": rule.how if rule else DEFAULT_RULE,
        "default": entry.field.get_default(call_default_factory=True) if entry.field else None,
        "changes": rule.changes if rule else "",
    }


def _explain(entry: Entry) -> str:
    rule, field = rule_of(entry.key), entry.field
    rows = {
        "source": entry.source,
        "meaning": meaning_of(field) if field else "",
        "rule": rule.how if rule else DEFAULT_RULE,
        "default": show_value(field.get_default(call_default_factory=True)) if field else "",
        "set with": _typed_as(entry.key, field) if field and not is_open(field) else "",
        "changes": f"with {rule.changes}" if rule and rule.changes else "",
    }
    lines = (f"  {what:<8} {text}" for what, text in rows.items() if text)
    return "\n".join([f"{entry.key} = {entry.shown}", *lines])


def _typed_as(key: str, field: FieldInfo) -> str:
    """How it is set, with the values that there are if they can be listed."""
    values = values_of(field)
    return f"{key}={' or '.join([', '.join(values[:-1]), values[-1]]) if values else '<value>'}"
