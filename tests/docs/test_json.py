"""What --json prints is what the action's page says, with every field named and alone on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

from kt_launch.actions.manual import page_of
from kt_launch.cli import main
from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_launch.doctor import Finding
from kt_launch.gathering.facts import prepare
from kt_launch.running.launch import record
from kt_launch.runs.state import Attempt
from kt_model.errors import Problems

SERVED = ("bench", "stop", "adapters")
"""Need a server: tests/bench and tests/operations call them."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What is typed after the name of each action."""
    root = tmp_path_factory.mktemp("data")
    model, lora = write_checkpoint(root / "model"), write_adapter(root / "west")
    launch = [f"model.path={model}", "model=auto", f"lora.path={lora}", "server.device=cpu"]
    typed: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "lora": {"path": str(lora)},
        "server": {"device": "cpu", "port": 30123},
        "kt": {"cpuinfer": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KT_LAUNCH_RUNS", str(root / "runs"))
        patch.setenv("KT_LAUNCH_CACHE", str(root / "cache"))
        names = []
        for context_length in (64, 128):
            typed["server"]["context_length"] = context_length
            plan = prepare(Config.model_validate(typed), Sources(), Problems())
            names.append(record(plan, None, [])[1].name)
        yield {
            "plan": launch,
            "fit": [launch[0], "fit.host=avx2"],
            "inspect": launch,
            "explain": launch,
            "config": launch,
            "schema": [],
            "doctor": [],
            "runs": [],
            "status": [f"run={names[0]}"],
            "diff": [f"runs=[{','.join(names)}]"],
            "replay": [f"run={names[0]}", "replay.start=false"],
            "quantize": [*launch[:2], "kt.method=int8"],
            "merge": [*launch[:3], f"merge.path={root / 'merged'}"],
            "cache": [],
        }


@pytest.mark.parametrize("action", [name for name in ACTIONS if page_of(name).data and name not in SERVED])
def test_the_fields_are_those_of_the_page(
    action: str, words: dict[str, list[str]], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_launch.actions.doctor.run_checks", lambda *_: [("one", Finding("pass", "well"))])
    if action == "cache":
        assert main(["quantize", *words["quantize"]]) == 0
        capfd.readouterr()
    assert main([action, "--json", *words[action]]) == 0
    content: Any = json.loads(capfd.readouterr().out)
    data = page_of(action).data
    assert data is not None
    rows = content if isinstance(content, list) else [content]
    assert data.of.startswith("one object") or action == "schema" or isinstance(content, list)
    if action != "replay":
        assert rows
    if data.fields:
        assert all(set(row) == {name for name, _ in data.fields} for row in rows)


@pytest.mark.parametrize("action", [name for name in ACTIONS if page_of(name).data is None])
def test_actions_without_data_say_so(action: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([action, "--json"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"error: format: kt-launch {action} prints nothing that JSON would hold. Leave --json out.\n" in captured.err


def test_a_start_has_the_fields_that_the_page_of_status_names() -> None:
    data = page_of("status").data
    assert data is not None
    assert [name for name in Attempt.__dataclass_fields__ if name not in dict(data.fields)["attempts"]] == []
