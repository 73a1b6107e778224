"""A folder in the place of a preset: model=/x is that model alone, lora=/y and lora=[/y,west] are adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

Launch = Callable[..., Any]
PLAN = ("plan", "--json", "server=cpu")
ODD = ["a b", "a,b", "it's", "a=b(c)", "[a]", "~a", "ä"]


def adapters_of(made: Any) -> dict[str, str]:
    """Name -> folder."""
    assert made.code == 0, made.err
    ends = {key: item["value"] for key, item in made.plan["resolved"].items() if key.endswith(".path")}
    return {key.split(".")[1]: value for key, value in ends.items() if key.startswith("lora.")}


@pytest.mark.parametrize("key", ["model", "model.path"])
def test_a_folder_is_that_model_alone(key: str, launch: Launch, checkpoint: Path) -> None:
    made = launch(*PLAN, f"{key}={checkpoint}")
    assert (made.value("model.path"), made.value("model.name")) == (str(checkpoint), "tiny")
    assert made.source("model.path") == f"command line: {key}={checkpoint}"
    assert adapters_of(made) == {}


@pytest.mark.parametrize("name", ODD)
def test_folders_are_taken_as_typed(name: str, launch: Launch, tmp_path: Path) -> None:
    model, lora = write_checkpoint(tmp_path / name / "m"), write_adapter(tmp_path / name / "west.v2")
    made = launch(*PLAN, f"model={model}", f"lora={lora}")
    assert made.value("model.path") == str(model)
    assert adapters_of(made) == {"west-v2": str(lora)}
    assert made.source("lora.west-v2.path") == f"command line: lora={lora}"


def test_a_folder_whose_name_is_not_utf8_is_refused_and_served_by_a_link(
    launch: Launch, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old archive has such names; neither a plan nor a request can name them."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/J\xf6rg"))
    model = write_checkpoint(root / "m")
    told = "is not UTF-8. Rename it, or name it by a link: ln -s FOLDER /a/link.\n"
    for words in ((f"model={model}",), ("model=auto", f"model.path={model}")):
        made = launch(*PLAN, *words)
        assert (made.code, made.err) == (2, f"error: model.path: the name of {tmp_path}/J\\udcf6rg/m {told}")
    link = tmp_path / "link"
    link.symlink_to(model)
    assert launch(*PLAN, f"model={link}").value("model.path") == str(link)
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(root / "runs"))
    problem = f"the name of {tmp_path}/J\\udcf6rg/runs is not UTF-8"
    assert launch(*PLAN, f"model={link}").err == (
        f"error: KT_LAUNCH_RUNS: {problem}. Set KT_LAUNCH_RUNS=/path/to/folder.\n"
    )


def test_a_snapshot_of_the_hubs_cache_has_its_repositorys_name(launch: Launch, tmp_path: Path) -> None:
    """Its folder is named after a commit."""
    model = write_checkpoint(tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0f3c")
    lora = write_adapter(tmp_path / "models--me--west.v2" / "snapshots" / "99aa")
    made = launch(*PLAN, f"model={model}", f"lora={lora}")
    assert (made.value("model.name"), adapters_of(made)) == ("Qwen3-30B-A3B", {"west-v2": str(lora)})


def test_the_home_and_relative_folders(
    launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(adapter.parent))
    near = os.path.relpath(checkpoint)
    assert adapters_of(launch(*PLAN, f"model={near}", "lora=~/west")) == {"west": str(adapter)}
    monkeypatch.chdir(checkpoint.parent)
    for typed in ("tiny", "./tiny", "tiny/"):
        assert launch(*PLAN, f"model={typed}").value("model.path") == str(checkpoint)


def test_a_preset_goes_before_a_folder_of_its_name(
    launch: Launch, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "demo")
    assert launch(*PLAN, "model=demo").value("model.path") != str(tmp_path / "demo")
    assert launch(*PLAN, "model=./demo").value("model.path") == str(tmp_path / "demo")


def test_several_adapters_presets_and_folders(launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    two = write_adapter(tmp_path / "7 two")
    (tmp_path / "own/lora").mkdir(parents=True)
    (tmp_path / "own/lora/mine.yaml").write_text(f"# @package lora.adapters.mine\npath: {adapter}\n")
    own = (*PLAN, "--config-dir", str(tmp_path / "own"), f"model={checkpoint}")
    made = launch(*own, f"lora=[mine,{two},{{name: third, path: {adapter}}}]")
    assert adapters_of(made) == {"mine": str(adapter), "lora-7-two": str(two), "third": str(adapter)}
    assert made.source("lora.mine.path").startswith("preset file: ")
    quoted = launch(*own, f"lora=['{two}',{adapter}]")
    assert adapters_of(quoted) == {"lora-7-two": str(two), "west": str(adapter)}
    renamed = launch(*own, f"lora={two}", "lora.name=other")
    assert adapters_of(renamed) == {"other": str(two)}


def test_on_top_of_a_config_file(launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    kept, other = tmp_path / "run.yaml", write_checkpoint(tmp_path / "other")
    made = launch("config", f"model={checkpoint}", f"lora={adapter}", "server=cpu", "kt.cpuinfer=1")
    assert f'  path: "{checkpoint}"  # command line: model={checkpoint}\n' in made.out
    kept.write_text(made.out)
    own = ("--config", str(kept), "plan", "--json")
    assert adapters_of(launch(*own)) == {"west": str(adapter)}
    changed = launch(*own, f"model={other}", f"lora=[{adapter}]")
    assert (changed.value("model.path"), changed.value("model.name")) == (str(other), "other")
    assert adapters_of(changed) == {"west": str(adapter)}


def test_sweeps_over_folders_and_presets(launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "second one")
    made = launch("-m", *PLAN, f"model={checkpoint},{other},demo", "lora=none")
    names = [json.loads(line)["resolved"]["model.name"]["value"] for line in made.out.splitlines()]
    assert names == ["tiny", "second-one", "demo"]
    assert f"'model={other}' lora=none: exit 0" in made.err
    mixed = launch("-m", *PLAN, f"model={checkpoint}", f"lora=none,[{adapter}],{adapter}")
    found = [json.loads(line)["resolved"].get("lora.west.path", {}).get("value") for line in mixed.out.splitlines()]
    assert found == [None, str(adapter), str(adapter)]


def test_a_folder_typed_alone_and_words_after_it(launch: Launch, checkpoint: Path) -> None:
    assert f"{checkpoint}: an action or key=value is expected. For a model of your own set model={checkpoint}." in (
        launch("plan", str(checkpoint)).err
    )
    made = launch("plan", "model=/my", "models/x")
    assert made.err.startswith("error: model: 'model=/my models/x' has spaces in it")
