"""action=fit: sizes and rates from config.json alone, held against checkpoints, public numbers and the records."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import FAMILIES, write_checkpoint

from kt_launch.actions.fit import _shape_file, shape_names, sizing_page
from kt_launch.machine.folders import conf_folder
from kt_model.checkpoint import read_checkpoint
from kt_model.estimated_checkpoint import estimate_checkpoint
from kt_model.families import expert_weights

Launch = Callable[..., Any]
ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "deepseek-v2-lite": 15.7e9,
    "qwen3-30b-a3b": 30.5e9,
    "mixtral-8x7b": 46.7e9,
    "glm-4.5-air": 106e9,
    "qwen3-235b-a22b": 235e9,
    "glm-4.5": 355e9,
    "deepseek-v3": 671e9,
}
"""As their makers tell them; those of layers that predict a further token are counted by some and not served."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sketch_has_the_matrices_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    whole = read_checkpoint(write_checkpoint(family, tmp_path / "model"))
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "bare")
    sketch = estimate_checkpoint(tmp_path / "bare" / "config.json", "model")
    experts = {
        name
        for layer in whole.moe_layers
        for one in range(whole.num_experts)
        for name in expert_weights(whole.family, layer, one)
    }
    matrices = [tensor for name, tensor in whole.tensors.items() if name not in experts and len(tensor.shape) == 2]
    scale = 2 / {"BF16": 2, "F32": 4, "F16": 2}[whole.expert_dtype]
    assert sketch.other_bytes == sum(tensor.end - tensor.start for tensor in matrices) * scale
    assert sketch.latent_projection_bytes == whole.latent_projection_bytes * scale
    assert sketch.expert_bytes == whole.expert_bytes


def test_the_shapes_that_ship_have_as_many_parameters_as_their_makers_say() -> None:
    found = {}
    for name in shape_names():
        shape = estimate_checkpoint(_shape_file(name), "")
        found[name] = (shape.expert_bytes + shape.other_bytes) / 2
    assert found == pytest.approx(PARAMETERS, rel=0.01)


def test_the_recorded_rates_are_those_of_the_records() -> None:
    spec = importlib.util.spec_from_file_location("rates", ROOT / "benchmarks" / "rates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads((conf_folder() / "rates.json").read_text()) == module.rates(), "python benchmarks/rates.py"


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    assert page == sizing_page(), "python -m kt_launch.actions.fit > docs/sizing.md"


def test_a_config_alone_is_enough(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(_shape_file("deepseek-v2-lite"), tmp_path / "mine" / "config.json")
    made = launch("fit", f"model={tmp_path / 'mine'}", "fit.host=avx2", "--json", "kt.cpuinfer=2")
    assert made.code == 0, made.err
    rows = {row["method"]: row for row in json.loads(made.out)}
    expert = 3 * 2048 * 1408
    assert {row["model"] for row in rows.values()} == {"mine"}
    assert rows["bf16"]["experts_bytes"] == 26 * 64 * expert * 2
    assert rows["bf16"]["tokens_per_s_beside_gpu"] == pytest.approx(16.9e9 / (26 * 6 * expert * 2))
    assert rows["bf16"]["tokens_per_s"] < rows["int8"]["tokens_per_s"] < rows["int8"]["tokens_per_s_beside_gpu"]
    assert 28 < rows["bf16"]["host_bytes"] / 2**30 < 34 and rows["bf16"]["gpu_bytes"] / 2**30 < 6
    two = launch("fit", f"model={tmp_path / 'mine'}", "fit.host=avx2", "--json", "server.tp=2", "server.nodes=2")
    half = {row["method"]: row for row in json.loads(two.out)}["bf16"]
    assert half["tokens_per_s"] == pytest.approx(2 * rows["bf16"]["tokens_per_s"])
    assert half["host_bytes"] < 0.6 * rows["bf16"]["host_bytes"]
    shown = launch("fit", "fit.shapes=[deepseek-v3,glm-4.5]", "fit.host=amx").out
    assert [line.split()[0] for line in shown.splitlines()[1:7]] == ["deepseek-v3"] * 3 + ["glm-4.5"] * 3


@pytest.mark.parametrize(("row", "words"), [("one socket", ()), ("two hosts", ("server.tp=2", "server.nodes=2"))])
def test_the_page_of_several_hosts_has_these_numbers(launch: Launch, row: str, words: tuple[str, ...]) -> None:
    settings = ("fit.shapes=[deepseek-v3]", "fit.host=amx", "kt.cpuinfer=16", "kt.threadpool_count=1")
    rows = [line.split() for line in launch("fit", *settings, *words).out.splitlines()[1:4]]
    memory, speed = (", ".join(columns[place] for columns in rows) for place in (3, 6))
    page = (ROOT / "docs" / "many-servers.md").read_text()
    assert re.search(rf"^\| {row}[^|]* \| {memory} \| {speed}\b", page, re.MULTILINE), (memory, speed)


def test_this_machine_is_measured(launch: Launch, checkpoint: Path) -> None:
    made = launch("fit", f"model={checkpoint}", "fit.host=this", "--json", "kt.cpuinfer=1")
    assert made.code == 0, made.err
    assert all(row["rates"] == "this" and 1 < row["tokens_per_s_beside_gpu"] < 1e7 for row in json.loads(made.out))


def test_unknown_shapes_and_hosts(launch: Launch) -> None:
    wrong = launch("fit", "fit.shapes=[deepseek-v4]")
    assert (wrong.code, wrong.err) == (2, "error: fit.shapes: no shape deepseek-v4. Did you mean deepseek-v3?\n")
    wrong = launch("fit", "fit.host=epyc")
    expected = "error: fit.host: no host epyc was measured. Choose from this, amx, avx2, avx512, xeon512.\n"
    assert (wrong.code, wrong.err) == (2, expected)
