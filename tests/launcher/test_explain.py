"""action=explain and action=schema: that every value has its reasons, and editors their schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_files import fused_tensors, write_adapter

from kt_launch.actions import Job, explain
from kt_launch.actions.explain import run
from kt_launch.config.schema import read_fields
from kt_launch.planning.rules import RULES, rule_of
from kt_model.plan import LaunchPlan

Launch = Callable[..., Any]


def test_a_key_is_explained_with_value_source_rule_and_what_changes_it(launch: Launch, checkpoint: Path) -> None:
    own = ("action=explain", "model=auto", f"model.path={checkpoint}", "server=cpu")
    shown = launch(*own, "key=kt.cpuinfer", "kt.cpuinfer=1")
    assert shown.code == 0
    assert shown.out.startswith("kt.cpuinfer = 1\n  source   command line: kt.cpuinfer=1\n")
    assert "rule     the smallest of: physical cores" in shown.out
    assert "changes  with taskset" in shown.out


@pytest.mark.parametrize(
    ("key", "typed"),
    [("kt.method", "kt.method=bf16, int8 or int4"), ("detach", "detach=true or false"), ("kt.cpuinfer", "<value>")],
)
def test_the_values_that_there_are_are_told(key: str, typed: str, launch: Launch) -> None:
    (line,) = (line for line in launch("explain", key).out.splitlines() if line.startswith("  set with "))
    assert line.endswith(typed)


def test_a_resolved_key_that_nobody_types_is_explained(launch: Launch, checkpoint: Path, adapter: Path) -> None:
    own = ("action=explain", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}", "server=cpu")
    shown = launch(*own, "key=lora.west.rank").out
    assert shown.startswith(f"lora.west.rank = 2\n  source   probed: {adapter}")


def test_every_key_is_listed_without_one(launch: Launch, checkpoint: Path) -> None:
    shown = launch("action=explain", "model=auto", f"model.path={checkpoint}", "server=cpu").out
    assert [key for key, _ in read_fields() if f"\n{key} " not in shown] == []


def test_a_config_with_mistakes_is_explained_all_the_same(launch: Launch) -> None:
    shown = launch("action=explain", "model=auto", "key=kt.cpuinfer")
    assert shown.code == 0
    assert "not resolved yet, because of model.path: no folder given" in shown.out


def test_an_unknown_key_offers_the_nearest(launch: Launch) -> None:
    shown = launch("action=explain", "key=kt.cpuinfr")
    said = "error: key: no key kt.cpuinfr. Did you mean kt-launch explain kt.cpuinfer?\n"
    assert (shown.code, shown.err) == (2, said)


def test_every_resolved_key_has_a_rule_or_is_a_key_of_the_config(plan: Launch, adapter: Path) -> None:
    keys = dict(read_fields())
    resolved = plan(f"lora.path={adapter}").plan["resolved"]
    assert [key for key in resolved if key not in keys and rule_of(key) is None] == []


def test_every_rule_belongs_to_a_key_there_is(plan: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_adapter(tmp_path / "hub" / "models--org--two" / "snapshots" / "c0ffee")
    write_adapter(tmp_path / "training" / "checkpoint-1", fused_tensors(), target_modules=[])
    made = LaunchPlan.from_json(plan(f"lora=[{tmp_path}/training,org/two@c0ffee]", "server.dp=2").out).placed_in(
        tmp_path
    )
    resolved = [*made.resolved, *(key for key, _ in read_fields())]
    used = {id(rule_of(key)) for key in resolved}
    assert [key for key, rule in RULES.items() if id(rule) not in used] == []


def test_the_schema_describes_every_key(launch: Launch) -> None:
    schema = json.loads(launch("action=schema").out)
    sections = {name: schema["$defs"][part["$ref"].rpartition("/")[2]] for name, part in schema["properties"].items()
                if "$ref" in part}  # fmt: skip
    described = {f"{name}.{key}" for name, section in sections.items() for key in section["properties"]}
    assert described | set(schema["properties"]) >= {key for key, _ in read_fields()}
    assert sections["kt"]["properties"]["cpuinfer"]["description"].startswith("Threads that compute experts")
    assert sections["kt"]["additionalProperties"] is False


def test_a_section_is_explained_as_a_whole(launch: Launch) -> None:
    shown = launch("action=explain", "key=kt").out
    rows = [line.split()[0] for line in shown.splitlines()[1:] if line[:1].strip()]
    assert set(rows) >= {key for key, _ in read_fields() if key.startswith("kt.")}
    assert [row for row in rows if not row.startswith("kt.")] == []


def test_every_key_of_a_plan_and_every_group_of_them_is_explained(
    launch: Launch,
    plan: Launch,
    checkpoint: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    own = ("server.device=cpu", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}")
    keys = [*plan(*own[3:]).plan["resolved"], "run.folder"]
    groups = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 1)}
    assert {"lora.west", "model", "fit.free"} <= groups | set(keys)
    jobs: list[Job] = []

    def keep(job: Job) -> int:
        jobs.append(job)
        return 0

    monkeypatch.setattr(explain, "run", keep)
    assert launch("action=explain", f"key={keys[0]}", *own).code == 0
    (typed,) = jobs

    def explained(key: str) -> str:
        """As typed, with another key."""
        run(replace(typed, config=typed.config.model_copy(update={"key": key})))
        shown = capfd.readouterr()
        assert shown.err == "", key
        return shown.out

    for key in keys:
        shown = explained(key)
        assert shown.startswith(f"{key} = ") and "\n  rule     " in shown
    for group in groups - {*keys, *dict(read_fields())}:
        rows = [line.split()[0] for line in explained(group).splitlines()[1:] if line[:1].strip()]
        assert set(rows) >= {key for key in keys if key.startswith(f"{group}.")}
        assert [row for row in rows if not row.startswith(f"{group}.")] == []


def test_a_key_with_others_below_it_is_explained_with_them(launch: Launch) -> None:
    shown = launch("action=explain", "key=fit").out
    assert shown.startswith("fit = host memory ")
    assert "\nfit.free " in shown


def test_an_adapter_of_a_preset_is_explained_as_it_is_typed(launch: Launch, checkpoint: Path) -> None:
    typed = ("model=auto", f"model.path={checkpoint}", "lora.adapters.chef.path=/a, b")
    shown = launch("action=explain", "key=lora.adapters", *typed).out
    assert shown.startswith("lora.adapters = chef\n")
    assert "\n  source   command line: lora.adapters.chef.path=/a, b\n" in shown
    assert "\nlora.adapters.chef.path " in shown and "command line: lora.adapters.chef.path=/a, b" in shown
    assert "not resolved yet, because of lora.adapters.chef.path: no folder /a, b" in shown
    assert launch("action=explain", "key=lora.chef.rank", *typed).out.startswith("lora.chef.rank = -\n")


def test_a_mistyped_adapter_or_group_offers_the_nearest(launch: Launch, checkpoint: Path, adapter: Path) -> None:
    own = ("action=explain", "model=auto", f"model.path={checkpoint}", f"lora.path={adapter}", "server=cpu")
    for typed, meant in {"lora.wst": "lora.west", "lora.wst.rank": "lora.west.rank", "run.foldr": "run.folder"}.items():
        shown = launch(*own, f"key={typed}")
        assert (shown.code, shown.err) == (2, f"error: key: no key {typed}. Did you mean kt-launch explain {meant}?\n")
