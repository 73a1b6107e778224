"""action=explain: a key's value, where it came from, the rule behind it, and what would change it. Starts nothing."""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.config import read_fields
from kt_launch.errors import EXIT_OK, LaunchError, LaunchErrors
from kt_launch.nearest import nearest_name
from kt_launch.plan import LaunchPlan
from kt_launch.prepare import prepare
from kt_launch.report import show_value
from kt_launch.rules import RULES, rule_of


def run(job: Job) -> int:
    key = job.config.key
    known = [name for name, _ in read_fields()]
    section = any(name.startswith(f"{key}.") for name in known)
    if key is not None and key not in known and rule_of(key) is None and not section:
        near = nearest_name(key, [*known, *RULES])
        fix = f"Did you mean key={near}?" if near else "kt-launch action=explain lists all."
        raise LaunchError("key", f"no key {key}", fix)
    plan, failure = _plan_or_failure(job)
    if key is None or (section and key not in known):
        _print_all(job, plan, f"{key}." if key else "")
    else:
        print(_explain(key, job, plan))
    for mistake in failure.errors if failure else []:
        print(f"\nnot resolved yet, because of {mistake}")
    return EXIT_OK


def _plan_or_failure(job: Job) -> tuple[LaunchPlan | None, LaunchErrors | None]:
    """A config with mistakes can still be explained."""
    try:
        return prepare(job.config, job.sources, job.problems), None
    except LaunchErrors as failure:
        return None, failure


def _explain(key: str, job: Job, plan: LaunchPlan | None) -> str:
    field, rule = dict(read_fields()).get(key), rule_of(key)
    value, source = _value_and_source(key, job, plan)
    lines = [f"{key} = {value}", f"  source   {source}"]
    if field is not None:
        lines.append(f"  meaning  {field.description}")
    lines.append(f"  rule     {rule.how if rule else 'what is typed; else what a preset says; else the default'}")
    if field is not None:
        lines.append(f"  default  {field.get_default(call_default_factory=True)}")
        lines.append(f"  type     {key}=<value> to set it")
    if rule is not None and rule.changes:
        lines.append(f"  changes  with {rule.changes}")
    return "\n".join(lines)


def _value_and_source(key: str, job: Job, plan: LaunchPlan | None) -> tuple[str, str]:
    if plan is not None and key in plan.resolved:
        item = plan.resolved[key]
        return show_value(item.value) if isinstance(item.value, (dict, list)) else str(item.value), item.source
    if key not in dict(read_fields()):
        return "-", "not in this plan"
    value: object = job.config
    for part in key.split("."):
        value = getattr(value, part)
    return str(value), job.sources.of(key)


def _print_all(job: Job, plan: LaunchPlan | None, prefix: str = "") -> None:
    from kt_launch.report import print_table

    fields = dict(read_fields())
    keys = [*fields, *(key for key in (plan.resolved if plan else {}) if key not in fields)]
    rows = []
    for key in filter(lambda each: each.startswith(prefix), keys):
        value, source = _value_and_source(key, job, plan)
        rule = rule_of(key)
        rows.append((key, value, source, fields[key].description or "" if key in fields else rule.how if rule else ""))
    print_table(("key", "value", "source", "meaning"), rows)
