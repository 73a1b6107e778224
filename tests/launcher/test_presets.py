"""Every shipped preset composes and validates, and what it becomes is what the installed SGLang's parser accepts."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from tiny_files import write_adapter, write_checkpoint

from kt_launch.config.actions import ACTIONS
from kt_launch.config.compose import Composer, hydra_of_others_kept
from kt_launch.config.presets import read_groups, shown_options
from kt_launch.machine.folders import PACKAGE, conf_folder, demo_folder

Launch = Callable[..., Any]
PRESETS = sorted(
    f"{group}={option}" for group, options in read_groups([conf_folder()]).items() for option in shown_options(options)
)
ENGINES = {
    "sweep=optuna": "hydra_optuna_sweeper",
    "sweep=ray": "hydra_ray_launcher",
    "sweep=slurm": "hydra_submitit_launcher",
}


def find_spec(module: str) -> object:
    """None also where the package above it is missing."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


@cache
def sglang_parser() -> argparse.ArgumentParser:
    """SGLang's own."""
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def accepted(argv: list[str]) -> argparse.Namespace:
    """What SGLang reads from a plan's command; argparse ends the test where it refuses."""
    return sglang_parser().parse_args(argv[4:])


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the presets' folders hold on a machine that has them."""
    write_checkpoint(tmp_path / "root" / "DeepSeek-V2-Lite-Chat")
    write_adapter(tmp_path / "root" / "Kllama2_deepseekV2_WEST_ALL")
    monkeypatch.setenv("KT_LAUNCH_MODELS", str(tmp_path / "root"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_composes_and_validates(preset: str, launch: Launch) -> None:
    shown = launch("--cfg", "job", preset)
    if preset in ENGINES and find_spec(f"hydra_plugins.{ENGINES[preset]}") is None:
        assert "pip install 'kt-launch[sweep]'" in shown.err
        pytest.skip(f"{ENGINES[preset]} is not installed: pip install 'kt-launch[sweep]'")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("model:")


def test_every_action_is_a_choice_and_a_file() -> None:
    files = (PACKAGE / "actions").glob("*.py")
    assert {file.stem for file in files if "\ndef run(job: Job)" in file.read_text()} == set(ACTIONS)
    assert {preset.removeprefix("action=") for preset in PRESETS if preset.startswith("action=")} == set(ACTIONS)


def test_a_preset_of_ones_own_may_stand_beside_the_actions(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "action").mkdir()
    (tmp_path / "action" / "mine.yaml").write_text("defaults:\n  - schema\n")
    made = launch("--config-dir", str(tmp_path), "action=mine")
    assert (made.code, '"$schema"' in made.out) == (0, True), made.err


@pytest.mark.parametrize("preset", ["kt=auto", "kt=bf16", "server=auto", "server=cpu", "lora=none", "lora=west_all"])
def test_sglang_accepts_the_arguments(preset: str, launch: Launch, roots: None) -> None:
    made = launch("action=plan", "format=json", "model=deepseek_v2_lite", "server.device=cpu", preset)
    read = accepted(made.plan["argv"])
    assert read.served_model_name == "deepseek-v2-lite"
    assert read.kt_cpuinfer == made.value("kt.cpuinfer")
    assert read.kt_num_gpu_experts == 0


def test_sglang_reads_the_adapters_as_they_were_named(launch: Launch, roots: None, tmp_path: Path) -> None:
    odd = write_adapter(tmp_path / "o=d,d (x)")
    own = ("action=plan", "format=json", "model=deepseek_v2_lite", "server=cpu", "lora=west_all")
    read = accepted(launch(*own, f"lora.path={odd}", "lora.name=odd").plan["argv"])
    names = dict(word.split("=", 1) for word in read.lora_paths)
    assert names["odd"] == str(odd)
    assert (read.max_loras_per_batch, read.max_lora_rank, read.lora_backend) == (3, 2, "torch_native")


def test_sglang_accepts_every_server_key(launch: Launch, roots: None) -> None:
    keys = ("context_length=64", "max_total_tokens=128", "max_running_requests=2", "mem_fraction=0.5")
    own = ("action=plan", "format=json", "model=deepseek_v2_lite", "server=cpu", "model.trust_remote_code=true")
    read = accepted(launch(*own, *(f"server.{key}" for key in keys)).plan["argv"])
    assert (read.context_length, read.max_total_tokens, read.max_running_requests) == (64, 128, 2)
    assert (read.mem_fraction_static, read.trust_remote_code) == (0.5, True)


@pytest.mark.skipif(not demo_folder("model").is_dir(), reason="the demo model is not in this checkout")
def test_the_default_is_the_demo_with_its_adapter(launch: Launch) -> None:
    made = launch("action=plan", "format=json", "server.device=cpu")
    assert made.code == 0, made.err
    read = accepted(made.plan["argv"])
    assert read.served_model_name == "demo"
    assert read.lora_paths == [f"west={demo_folder('west')}"]
    bare = launch("action=plan", "format=json", "server.device=cpu", "lora=none")
    assert "--enable-lora" not in bare.plan["argv"]


def test_composing_copies_nothing_that_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra would copy the store with all it holds for each config; ours takes the place of its repository."""
    copied: list[str] = []

    class Group(dict[str, Any]):
        def __deepcopy__(self, memo: dict[int, Any]) -> Group:
            copied.append("a group of the store")
            return self

    monkeypatch.setitem(ConfigStore.instance().repo, "of_a_test", Group())
    with hydra_of_others_kept():
        assert Composer(None).compose([]).raw["action"] == {"name": "serve"}
    assert copied == []
