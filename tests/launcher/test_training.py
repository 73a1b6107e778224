"""Folders of training runs: which checkpoint is meant, what the plan says of the others, what lies around unread."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

Launch = Callable[..., Any]
WEST = "Kllama2_deepseekV2_WEST_ALL"
PICKLE = b"\x80\x04 a pickle under another name"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's two roots, with both variables set."""
    write_checkpoint(tmp_path / "models" / "DeepSeek-V2-Lite-Chat")
    for step in (9, 66, 133):
        write_adapter(tmp_path / "loras" / WEST / f"checkpoint-{step}")
    monkeypatch.setenv("KT_LAUNCH_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("KT_LAUNCH_LORAS", str(tmp_path / "loras"))
    return tmp_path


@pytest.fixture
def presets(launch: Launch) -> Launch:
    """The user's command, planned."""

    def call(*overrides: str) -> Any:
        return launch("action=plan", "format=json", "server=cpu", "model=deepseek_v2_lite", *overrides)

    return call


def adapter_warnings(made: Any) -> list[str]:
    return [warning for warning in made.plan["warnings"] if warning.startswith("lora.")]


def test_a_training_folder_means_its_newest_checkpoint(presets: Launch, roots: Path) -> None:
    folder = roots / "loras" / WEST
    made = presets("lora=west_all")
    assert made.value("lora.west_all.path") == str(folder / "checkpoint-133")
    given = f"environment: KT_LAUNCH_LORAS={roots / 'loras'}; preset file: conf/lora/west_all.yaml"
    assert made.source("lora.west_all.path") == given
    assert made.value("lora.west_all.checkpoint") == "checkpoint-133"
    why = f"probed: the highest step in {folder}, before checkpoint-9, checkpoint-66"
    assert made.source("lora.west_all.checkpoint") == why
    assert f"west_all={folder / 'checkpoint-133'}" in made.plan["argv"]
    assert adapter_warnings(made) == []


def test_the_same_by_path_in_a_list_and_for_one_checkpoint(presets: Launch, roots: Path) -> None:
    folder = roots / "loras" / WEST
    by_path = presets(f"lora.path={folder}")
    assert by_path.value(f"lora.{WEST}.path") == str(folder / "checkpoint-133")
    assert by_path.source(f"lora.{WEST}.path") == f"command line: lora.path={folder}"
    several = presets(
        f"lora=[west_all,{{name: early, path: {folder / 'checkpoint-9'}}},{{name: late, path: {folder}}}]"
    )
    assert several.value("lora.west_all.path") == several.value("lora.late.path") == str(folder / "checkpoint-133")
    assert several.value("lora.early.path") == str(folder / "checkpoint-9")
    assert "lora.early.checkpoint" not in several.plan["resolved"]


def test_a_final_adapter_comes_before_its_checkpoints(presets: Launch, roots: Path) -> None:
    folder = roots / "loras" / WEST
    for file in (folder / "checkpoint-9").iterdir():
        shutil.copy(file, folder)
    made = presets("lora=west_all")
    assert made.value("lora.west_all.path") == str(folder)
    assert made.value("lora.west_all.checkpoint") == "final"
    why = f"probed: {folder / 'adapter_config.json'}, before checkpoint-9, checkpoint-66, checkpoint-133 below it"
    assert made.source("lora.west_all.checkpoint") == why


def test_a_checkpoint_that_was_not_finished_is_passed_over_and_named(presets: Launch, roots: Path) -> None:
    folder = roots / "loras" / WEST
    write_adapter(folder / "checkpoint-200")
    (folder / "checkpoint-200" / "adapter_config.json").unlink()
    made = presets("lora=west_all")
    assert made.value("lora.west_all.checkpoint") == "checkpoint-133"
    assert made.source("lora.west_all.checkpoint").endswith("; checkpoint-200 has no adapter_config.json")


def test_what_looks_like_weights_is_named_once_and_never_opened(presets: Launch, roots: Path) -> None:
    """A fifo would block whoever opens it, a file without rights would fail."""
    folder = roots / "loras" / WEST
    (folder / "moe_lora.pt").write_bytes(PICKLE)
    (folder / "moe_lora.pt").chmod(0)
    checkpoint = folder / "checkpoint-133"
    (checkpoint / "adapter_model_converted.safetensors").write_bytes(PICKLE)
    (checkpoint / "adapter_model_converted.safetensors").chmod(0)
    (checkpoint / "pytorch_model.bin").symlink_to(folder / "moe_lora.pt")
    for own in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "README.md"):
        (checkpoint / own).write_bytes(PICKLE)
    os.mkfifo(checkpoint / "pipe.pt")
    names = "adapter_model_converted.safetensors, pytorch_model.bin, ../moe_lora.pt"
    message = f"lora.west_all: {names} look like weights and are not read; the adapter is adapter_model.safetensors"
    assert adapter_warnings(presets("lora=west_all")) == [message]
    direct = presets(f"lora.path={checkpoint}", "lora.name=west")
    assert adapter_warnings(direct) == [message.replace("west_all", "west")]


def test_inspect_and_merge_take_the_same_checkpoint(launch: Launch, roots: Path) -> None:
    folder = roots / "loras" / WEST
    (folder / "moe_lora.pt").write_bytes(PICKLE)
    words = ("model=deepseek_v2_lite", "lora=west_all")
    (facts,) = json.loads(launch("action=inspect", "format=json", *words).out)
    assert (facts["path"], facts["checkpoint"]) == (str(folder / "checkpoint-133"), "checkpoint-133")
    assert "before checkpoint-9, checkpoint-66" in facts["checkpoint_source"]
    unread = "../moe_lora.pt looks like weights and is not read; the adapter is adapter_model.safetensors"
    assert facts["warnings"] == [unread]
    shown = launch("action=inspect", *words).out
    assert f"west_all: {folder / 'checkpoint-133'}\ncheckpoint-133 (probed: the highest step in {folder}" in shown
    merged = launch("action=merge", *words, f"merge.path={roots / 'merged'}")
    assert merged.code == 0, merged.err
    assert f"west_all: checkpoint-133 (probed: the highest step in {folder}" in merged.err
    assert f"warning: {unread}" in merged.err


def test_the_record_of_a_run_hashes_no_left_over_file(presets: Launch, roots: Path) -> None:
    from kt_launch.runs.lock import hash_files
    from kt_model.plan import LaunchPlan

    checkpoint = roots / "loras" / WEST / "checkpoint-133"
    (checkpoint / "adapter_model_converted.safetensors").write_bytes(PICKLE)
    hashed = hash_files(LaunchPlan.from_json(presets("lora=west_all").out))
    assert [Path(file).name for file in hashed if file.startswith(str(checkpoint))] == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_a_folder_of_adapters_is_told_with_what_lies_below(presets: Launch, roots: Path) -> None:
    (line,) = failed(presets(f"lora.path={roots / 'loras'}"))
    meant = f"Set lora.path={roots / 'loras' / WEST}."
    assert line == f"lora.path: {roots / 'loras'} has no adapter_config.json. {meant}"
    write_adapter(roots / "loras" / "chef")
    (line,) = failed(presets(f"lora.path={roots / 'loras'}"))
    assert line.endswith(f"Set lora.path={roots / 'loras' / WEST} (there are also chef).")
    (roots / "run" / "checkpoint-5").mkdir(parents=True)
    (line,) = failed(presets(f"lora.path={roots / 'run'}"))
    assert line.endswith("Its checkpoint-5 has none either: save the adapter with PEFT's save_pretrained.")


# Roots: unset, right, and wrong in each way


def failed(made: Any) -> list[str]:
    assert made.code == 2
    return [line.removeprefix("error: ") for line in made.err.splitlines()]


def test_the_models_root_is_enough_where_adapters_lie_below_it(
    presets: Launch, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(roots / "loras" / WEST, roots / "models")
    monkeypatch.delenv("KT_LAUNCH_LORAS")
    made = presets("lora=west_all")
    assert made.value("lora.west_all.path") == str(roots / "models" / WEST / "checkpoint-133")
    assert made.source("lora.west_all.path").startswith(f"environment: KT_LAUNCH_MODELS={roots / 'models'}; preset")


def test_without_roots_both_variables_are_named(presets: Launch, launch: Launch) -> None:
    assert failed(presets("lora=west_all")) == [
        "model.path: the folder DeepSeek-V2-Lite-Chat is expected below a root, but none is given. "
        "Set KT_LAUNCH_MODELS, or set model.path=/path/to/folder.",
        f"lora.adapters.west_all.path: the folder {WEST} is expected below a root, but none is given. "
        "Set KT_LAUNCH_LORAS (or KT_LAUNCH_MODELS, where adapters lie beside the models), or set "
        "lora.adapters.west_all.path=/path/to/folder.",
    ]


WRONG = {
    "none": (
        "no folder {root}/none, in which {folder} is expected (environment: {variable}={root}/none)",
        "Set {variable} to the folder that holds it, or set {key}.path=/path/to/folder.",
    ),
    "file": (
        "{root}/file is a file, but a folder with {folder} in it is expected (environment: {variable}={root}/file)",
        "Set {variable} to the folder that holds it, or set {key}.path=/path/to/folder.",
    ),
    "empty": (
        "no folder {folder} in {root}/empty (environment: {variable}={root}/empty), which holds no folder",
        "Set {variable} to the folder that holds it, or set {key}.path=/path/to/folder.",
    ),
    "other": (
        "no folder {folder} in {root}/other (environment: {variable}={root}/other), which holds a, b, c, d, e and 1 "
        "more",
        "Set {variable} to the folder that holds it, or set {key}.path=/path/to/folder.",
    ),
    "near": (
        "no folder {folder} in {root}/near (environment: {variable}={root}/near), which holds {near}",
        "Did you mean {key}.folder={near}?",
    ),
    "hub": (
        "no folder {folder} in {root}/hub (environment: {variable}={root}/hub), which holds owner",
        "Did you mean {key}.folder=owner/{folder}?",
    ),
    "itself/{folder}": (
        "no folder {folder} in {root}/itself/{folder}, which may itself be that folder (environment: "
        "{variable}={root}/itself/{folder})",
        "Set {variable}={root}/itself, or set {key}.path=/path/to/folder.",
    ),
}  # fmt: skip
ASKED = {
    "KT_LAUNCH_MODELS": ("model", "DeepSeek-V2-Lite-Chat"),
    "KT_LAUNCH_LORAS": ("lora.adapters.west_all", WEST),
}


@pytest.mark.parametrize("variable", ASKED)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_root_is_one_error_with_what_lies_there(
    wrong: str, variable: str, presets: Launch, roots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, folder = ASKED[variable]
    near = folder.replace("-", "_").lower() if variable == "KT_LAUNCH_MODELS" else folder.lower()
    (roots / "file").touch()
    for made in (
        "empty",
        *(f"other/{name}" for name in "abcdef"),
        f"near/{near}",
        f"hub/owner/{folder}",
        f"itself/{folder}",
    ):
        (roots / made).mkdir(parents=True)
    known = {"root": roots, "folder": folder, "variable": variable, "key": key, "near": near}
    monkeypatch.setenv(variable, str(roots / wrong.format(**known)))
    problem, fix = (text.format(**known) for text in WRONG[wrong])
    assert failed(presets("lora=west_all")) == [f"{key}.path: {problem}. {fix}"]


def test_a_typed_root_is_told_by_its_key(presets: Launch, roots: Path) -> None:
    (line,) = failed(presets("lora=west_all", f"paths.loras={roots / 'none'}"))
    message = f"(command line: paths.loras={roots / 'none'}). Set paths.loras to the folder that holds it, or set"
    assert message in line
