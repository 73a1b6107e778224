"""action=config prints a config that `--config` starts from: the same config, with what is typed on top."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_launch.commandline.arguments import read_arguments
from kt_launch.config.compose import Composer
from kt_launch.config.dump import FILE_VARIABLE, anchored, kept_values, nested, write_yaml
from kt_launch.config.schema import Config
from kt_launch.config.validation import validate

Launch = Callable[..., Any]
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$"), min_size=1, max_size=12)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries({"path": TEXTS}, optional={"name": TEXTS, "trust_remote_code": st.booleans()}),
        "lora": st.fixed_dictionaries(
            {"adapters": st.dictionaries(NAMES, st.fixed_dictionaries({"path": TEXTS}), max_size=3)},
            optional={"ignore": st.lists(TEXTS, max_size=3), "max_rank": st.integers(1, 64)},
        ),
        "kt": st.fixed_dictionaries(
            {}, optional={"method": st.sampled_from(["bf16", "int8", "int4"]), "cpuinfer": st.integers(1, 64)}
        ),
        "server": st.fixed_dictionaries(
            {},
            optional={
                "port": st.integers(0, 65535),
                "mem_fraction": st.floats(0.01, 0.99),
                "extra_args": st.lists(TEXTS, max_size=3),
                "api_key": st.just("env:MINE"),
                "cuda_graph": st.sampled_from(["auto", "off"]),
            },
        ),
        "bench": st.fixed_dictionaries({"concurrency": st.lists(st.integers(1, 99), min_size=1, max_size=3)}),
        "detach": st.booleans(),
    },
)


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What --config leaves in the environment is gone after each test."""
    monkeypatch.setenv(FILE_VARIABLE, "")
    yield
    os.environ.pop(FILE_VARIABLE, None)


def read_back(file: Path, *typed: str) -> Config:
    """The config that kt-launch --config FILE works with."""
    composed = Composer(None).compose(read_arguments(["--config", str(file), *typed]).overrides)
    config, mistakes = validate(composed.raw)
    assert mistakes == []
    return config


def seen_from(folder: Path, config: Config) -> Config:
    """With relative paths as they are in a file in that folder."""
    values = {key: anchored(key, value, folder) for key, value in kept_values(config).items()}
    return Config.model_validate(nested(values))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=CONFIGS)
def test_a_file_is_the_config_that_it_was_made_of(raw: dict[str, Any], tmp_path: Path) -> None:
    config = Config.model_validate(raw)
    file = tmp_path / "run.yaml"
    text = write_yaml(kept_values(config), lambda key: "typed", ["a note"])
    file.write_text(text)
    assert (yaml.safe_load(text) or {}) == nested(kept_values(config))
    again = read_back(file)
    assert again == seen_from(tmp_path, config)
    text = write_yaml(kept_values(again), lambda key: "typed", ["a note"])
    file.write_text(text)
    assert write_yaml(kept_values(read_back(file)), lambda key: "typed", ["a note"]) == text
    file.write_text(write_yaml(kept_values(config, full=True), lambda key: "typed", []))
    assert read_back(file) == again


def test_names_that_yaml_takes_for_something_else_and_sources_of_several_lines(tmp_path: Path) -> None:
    config = Config.model_validate({"lora": {"adapters": {"on": {"path": "/a"}, "null": {"path": "/b"}}}})
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(kept_values(config), lambda key: "typed\nserver:\n  open: true", ["one\ndetach: true"]))
    assert read_back(file) == config


@pytest.fixture
def kept(launch: Launch, checkpoint: Path, adapter: Path, tmp_path: Path) -> Path:
    """A file of action=config."""
    own = ("model=auto", f"model.path={checkpoint}", "lora=none", f"lora.adapters.west.path={adapter}", "server=cpu")
    made = launch(*own, "kt.cpuinfer=1", "action=config")
    assert made.code == 0, made.err
    file = tmp_path / "run.yaml"
    file.write_text(made.out)
    return file


def test_a_launch_starts_from_it_with_more_on_top(kept: Path, launch: Launch, checkpoint: Path) -> None:
    assert "  cpuinfer: 1  # command line: kt.cpuinfer=1\n" in kept.read_text()
    plan = launch("--config", str(kept), "action=plan", "format=json", "server.context_length=64")
    assert plan.value("model.path") == str(checkpoint)
    assert plan.source("kt.cpuinfer") == f"config file: {kept}"
    assert plan.source("server.context_length") == "command line: server.context_length=64"
    assert "lora.west.path" in plan.plan["resolved"]
    bare = launch("--config", str(kept), "action=plan", "format=json", "lora=none")
    assert "lora.west.path" not in bare.plan["resolved"]


def test_it_works_from_another_folder(
    kept: Path, launch: Launch, checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that was printed has whole paths, and relative ones that were written into it start beside it."""
    monkeypatch.chdir(checkpoint.parent)
    keys = ("server.api_key=file:key", "server.admin_key=file:~/key")
    made = launch("config", f"model={checkpoint.name}/", "lora.path=~/west", "kt.cpuinfer=1", "server=cpu", *keys)
    assert f'path: "{checkpoint}"  # ' in made.out and '  path: "~/west"  # ' in made.out
    assert f'api_key: "file:{checkpoint.parent}/key"  # ' in made.out and 'admin_key: "file:~/key"  # ' in made.out
    printed = tmp_path / "printed.yaml"
    printed.write_text(made.out)
    text = kept.read_text().replace(str(checkpoint), os.path.relpath(checkpoint, tmp_path))
    kept.write_text(text.replace(str(adapter), os.path.relpath(adapter, tmp_path)) + '  api_key: "file:key"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert launch("--config", str(printed), "lora=none", "plan", "--json").value("model.path") == str(checkpoint)
    planned = launch("--config", "../run.yaml", "plan", "--json")
    assert (planned.value("model.path"), planned.value("lora.west.path")) == (str(checkpoint), str(adapter))
    assert planned.source("model.path") == f"config file: {kept}"
    assert planned.value("server.api_key") == f"file:{tmp_path}/key"


def test_a_sweep_over_it(kept: Path, launch: Launch) -> None:
    made = launch("-m", "--config", str(kept), "action=plan", "format=json", "server.context_length=64,128")
    assert made.code == 0, made.err
    assert len(made.out.splitlines()) == 2


def test_what_is_done_is_typed_and_never_read(kept: Path, launch: Launch) -> None:
    kept.write_text(kept.read_text() + "action:\n  name: serve\n")
    assert launch("--config", str(kept), "action=plan", "format=json").code == 0


@pytest.mark.parametrize(
    "text", ["action:\n  name: schema\n", "defaults:\n  - override /action: schema\n"], ids=["value", "choice"]
)
def test_no_preset_starts_anything(text: str, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own/sweep").mkdir(parents=True)
    (tmp_path / "own/sweep/evil.yaml").write_text(f"# @package _global_\n{text}")
    own = ("--config-dir", str(tmp_path / "own"), "sweep=evil", "server=cpu", "runs", "--json")
    assert launch(*own).out == "[]\n"
    swept = launch("-m", *own)
    assert (swept.code, swept.out) == (0, "[]\n")
    typed = launch("plan", "action.name=serve")
    assert (typed.code, typed.out) == (2, "")
    assert "action.name: an action is typed by its name. Type kt-launch serve." in typed.err


def test_frozen_values_plan_the_same(kept: Path, launch: Launch, tmp_path: Path) -> None:
    made = launch("--config", str(kept), "action=config", "config.resolved=true", "server.port=11623")
    assert made.code == 0, made.err
    assert '"model/config.json": "sha256:' in made.out and '"sglang": "0.' in made.out
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(made.out)
    one, other = (
        launch("--config", str(file), "action=plan", "format=json", "server.port=11623").plan for file in (kept, frozen)
    )
    assert one["argv"] == other["argv"]
    assert one["env"] == other["env"]


def test_a_config_of_another_machine_says_what_does_not_fit(kept: Path, launch: Launch, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen.yaml"
    own = ("--config", str(frozen), "plan", "--json")
    frozen.write_text(launch("--config", str(kept), "config", "config.resolved=true", "server.port=11623").out)
    assert [text for text in launch(*own).plan["warnings"] if text.startswith("--config")] == []
    text = frozen.read_text()
    digest = re.search(r'"model/config.json": "sha256:(\w+)"', text)
    assert digest is not None
    text = text.replace(digest[1], "0" * 64).replace('"torch": "', '"torch": "0.')
    frozen.write_text(re.sub("cpuinfer: 1 ", "cpuinfer: 4096 ", text))
    wrong = launch(*own)
    assert wrong.code == 2
    assert re.search(r"kt.cpuinfer: 4096 threads, but .* \(config file: .*frozen.yaml\)", wrong.err), wrong.err
    warnings = launch(*own, "kt.cpuinfer=1").plan["warnings"]
    found = [text for text in warnings if text.startswith("--config")]
    assert re.fullmatch(r"--config: torch 0\.\S+ where it was made, \S+ here", found[0])
    assert re.fullmatch(r"--config: .*config.json is not the model/config.json that it was made with .*", found[1])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("a: [", "is not valid YAML"),
        ("- a", "holds no keys"),
        ('{"config": {}, "resolved": {}, "argv": []}', "is a run's plan, and no config. kt-launch replay run="),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(
                f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(10))}]\n" for a, b in zip("abcde", "bcdef", strict=True)
            ),
            "is not valid YAML: has more than 10000 values",
        ),
    ],
)
def test_a_file_that_is_none(text: str | None, problem: str, launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    made = launch("--config", str(file), "action=plan")
    assert made.code == 2
    assert f"error: --config: {file} {problem}" in made.err


def test_the_composed_config_is_validated(launch: Launch) -> None:
    made = launch("--cfg", "job", "server.port=abc")
    assert (made.code, made.out) == (2, "")
    assert "server.port" in made.err
