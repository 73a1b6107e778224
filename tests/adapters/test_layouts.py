"""In which order the columns of fused experts are read: declared, typed, measured, or refused because nothing tells.

How often measuring errs is measure_layouts.py's to say; here two adapters are trained, and the rules are held.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure_layouts import Training, ask
from safetensors.torch import load_file
from tiny_checkpoints import write_checkpoint
from written import UNSLOTH, regroup, write_fused, write_grouped

from kt_launch.cli import main
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.importer import Imported, import_adapter
from kt_model.importer.layouts import GROUPED, RANK_MAJOR, find_marks

CASE = Path(__file__).resolve().parent / "cases" / "unsloth_marked_grouped_by_expert"
FILE = "adapter_model.safetensors"
TELL = (
    "Set lora.layout=grouped_by_expert if Unsloth trained it between February and 17 September 2026, "
    "else lora.layout=rank_major."
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By PEFT, as PEFT saves: its own order, and no word of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Training("qwen3_moe", rank=4).write(tmp_path_factory.mktemp("trained"))
    finally:
        torch.set_num_threads(threads)


def change(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def copied(adapter: Path, folder: Path, *, grouped: bool = False, **changes: Any) -> Path:
    shutil.copytree(adapter, folder)
    if grouped:
        regroup(folder, 4)
    return change(folder, **changes)


def order_of(folder: Path, **options: Any) -> str:
    return str(import_adapter(folder, **options).require_sound().order)


def problem(folder: Path, **options: Any) -> str:
    with pytest.raises(LaunchErrors) as raised:
        import_adapter(folder, **options).require_sound()
    return str(raised.value)


def assert_same(found: Imported, expected: Imported) -> None:
    assert found.pairs.keys() == expected.pairs.keys()
    for name, pair in found.pairs.items():
        np.testing.assert_array_equal(pair.delta(), expected.pairs[name].delta())


def test_a_declared_order_is_obeyed_as_defined() -> None:
    """B[o, e·r + j] and A[e·r + j, i] are expert e's."""
    imported, tensors = import_adapter(CASE).require_sound(), load_file(CASE / FILE)
    assert imported.order is not None
    assert (str(imported.order), imported.order.why) == (GROUPED, "adapter_config.json: lora_B_layout")
    for pair in imported.of_kind("routed_experts"):
        expert, down = pair.target.expert or 0, pair.target.projection == "down"
        stem = f"base_model.model.model.layers.{pair.target.layer}.mlp.experts{'' if down else '.base_layer'}"
        rows = slice(4 * expert, 4 * expert + 4)
        a, b = tensors[f"{stem}.lora_A.weight"][rows], tensors[f"{stem}.lora_B.weight"][:, rows]
        whole = 2 * b.double().numpy() @ a.double().numpy()
        gate, up = np.split(whole, 2) if not down else (whole, whole)
        expected = up if pair.target.projection == "up" else gate
        np.testing.assert_array_equal(pair.delta(), expected.astype(np.float32))


@pytest.mark.parametrize("old", [False, True])
def test_both_orders_of_one_adapter_are_the_same(old: bool, checkpoint: Path, tmp_path: Path) -> None:
    base = read_checkpoint(checkpoint)
    ranked = import_adapter(write_fused(tmp_path / "a", checkpoint, old=old), base).require_sound()
    grouped = import_adapter(write_grouped(tmp_path / "b", checkpoint, old=old), base).require_sound()
    assert (str(ranked.order), str(grouped.order)) == (RANK_MAJOR, GROUPED)
    assert_same(grouped, ranked)


def test_each_parameter_may_have_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_grouped(tmp_path / "a", checkpoint, declared=False)
    tensors, ranked = load_file(folder / FILE), load_file(write_fused(tmp_path / "b", checkpoint) / FILE)
    from safetensors.torch import save_file

    save_file({name: (ranked if "base_layer" in name else tensors)[name] for name in tensors}, folder / FILE)
    facts = {"gate_up_proj": {"lora_B_layout": RANK_MAJOR}, "down_proj": {"lora_B_layout": GROUPED}}
    change(folder, unsloth_fused_expert_lora={"lora_A_layout": GROUPED, "parameters": facts})
    found = import_adapter(folder, read_checkpoint(checkpoint)).require_sound()
    assert str(found.order) == "down_proj grouped_by_expert, gate_up_proj rank_major"
    assert_same(found, import_adapter(tmp_path / "b", read_checkpoint(checkpoint)))


DOWN = {"parameters": {"down_proj": {"lora_B_layout": GROUPED}}}
MIXED = {"parameters": {"gate_up_proj": {"lora_B_layout": "mixed"}, "down_proj": {"lora_B_layout": GROUPED}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_B_layout": "expert_major"},
            "adapter_config.json says lora_B_layout=expert_major of down_proj, but one of rank_major, "
            f"grouped_by_expert is expected. {TELL}",
        ),
        ({"lora_B_layout": None, "unsloth_fused_expert_lora": MIXED}, "says lora_B_layout=mixed of gate_up_proj, but"),
        (
            {"lora_B_layout": RANK_MAJOR, "unsloth_fused_expert_lora": DOWN},
            "says lora_B_layout=rank_major, but grouped_by_expert of down_proj. Set",
        ),
        ({"lora_A_layout": RANK_MAJOR}, "lora_A_layout=rank_major (rows of A in another order)"),
        (
            {"unsloth_fused_expert_lora": {"lora_A_layout": "x"}},
            "unsloth_fused_expert_lora.lora_A_layout=x (rows of A in another order)",
        ),
    ],
)  # fmt: skip
def test_words_that_are_not_known_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problem(copied(CASE, tmp_path / "a", **changes))


def test_what_is_typed_is_obeyed_for_both(tmp_path: Path) -> None:
    """Whatever the file says: even words that are not known."""
    read_as = {typed: import_adapter(CASE, layout=typed).require_sound() for typed in (RANK_MAJOR, GROUPED)}
    assert {typed: str(found.order) for typed, found in read_as.items()} == {each: each for each in read_as}
    assert read_as[RANK_MAJOR].order.why == "lora.layout"  # type: ignore[union-attr]
    unknown = copied(CASE, tmp_path / "a", lora_B_layout="expert_major")
    assert_same(import_adapter(unknown, layout=GROUPED).require_sound(), import_adapter(CASE))
    silent = copied(CASE, tmp_path / "b", lora_B_layout=None)
    assert_same(import_adapter(silent, layout=RANK_MAJOR).require_sound(), read_as[RANK_MAJOR])


def test_trained_values_tell(trained: Path, tmp_path: Path) -> None:
    other = copied(trained, tmp_path / "a", grouped=True)
    assert (ask(trained), ask(other)) == (RANK_MAJOR, GROUPED)
    found = import_adapter(other)
    assert_same(found, import_adapter(trained))
    (warning,) = found.warnings
    assert warning.startswith("fused experts are read as grouped_by_expert, which is not PEFT's order: mean squared")
    assert warning.endswith("; if that is wrong, set lora.layout=rank_major")
    assert import_adapter(change(other, **UNSLOTH)).warnings == ()


@pytest.mark.parametrize("grouped", [False, True])
def test_values_that_contradict_what_is_said_are_warned_of(grouped: bool, trained: Path, tmp_path: Path) -> None:
    true, said = (GROUPED, RANK_MAJOR) if grouped else (RANK_MAJOR, GROUPED)
    folder = copied(trained, tmp_path / "a", grouped=grouped, lora_B_layout=said)
    declared, typed = import_adapter(folder), import_adapter(change(folder, lora_B_layout=true), layout=said)
    for found, why in ((declared, "adapter_config.json: lora_B_layout"), (typed, "lora.layout")):
        assert str(found.order) == said
        (warning,) = found.warnings
        assert warning.startswith(f"fused experts are read as {said} ({why}), but look like {true}: mean squared")


CARD = "---\nbase_model: Qwen/Qwen3-30B-A3B\ntags:\n- lora\n- unsloth\n---\n# Model\n"
MARKS: dict[str, dict[str, Any]] = {
    "auto_mapping.unsloth_fixed in adapter_config.json": UNSLOTH,
    "its name in base_model_name_or_path": {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"},
    "unsloth_fused_expert_lora in adapter_config.json": {"unsloth_fused_expert_lora": {"lora_A_layout": GROUPED}},
    "its tag in README.md": {},
}


@pytest.mark.parametrize("mark", MARKS)
def test_what_nothing_tells_is_refused_where_unsloth_left_its_marks(
    mark: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = change(write_fused(tmp_path / "a", checkpoint), **MARKS[mark])
    if "README" in mark:
        (folder / "README.md").write_text(CARD)
    assert problem(folder) == (
        "lora.path: the columns of its fused experts may run in PEFT's order or in that of an earlier Unsloth: "
        f"adapter_config.json has no lora_B_layout, the values do not show it, and Unsloth left {mark}. {TELL}"
    )
    assert order_of(folder, layout=GROUPED) == GROUPED


def test_without_marks_it_is_pefts(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_fused(tmp_path / "a", checkpoint)
    (folder / "README.md").write_text("# trained without unsloth\n- unsloth\n")
    found = import_adapter(folder).require_sound()
    assert found.order is not None
    why = "PEFT's order, since nothing indicates another"
    assert (str(found.order), found.order.why, found.warnings) == (RANK_MAJOR, why, ())


def test_one_rank_needs_no_order(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_fused(tmp_path / "a", checkpoint, rank=1, **UNSLOTH)
    found = import_adapter(folder).require_sound()
    assert found.order is not None
    assert found.order.why == "both orders are the same for one rank or one expert"
    assert_same(import_adapter(folder, layout=GROUPED), found)


def test_an_adapter_of_single_experts_has_none() -> None:
    assert import_adapter(CASE.parent / "tinker_shared_outer", layout=GROUPED).order is None


def test_columns_of_experts_that_no_token_reached_do_not_count(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = copied(trained, tmp_path / "a")
    tensors = load_file(folder / FILE)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.unflatten(1, (4, 8))[:, :, [1, 4, 6]] = 0
    save_file(tensors, folder / FILE)
    assert ask(folder) == RANK_MAJOR
    regroup(folder, 4)
    assert ask(folder) == GROUPED


def test_experts_that_share_their_b_do_not_look_like_another_order(trained: Path, tmp_path: Path) -> None:
    """Columns of different experts are then the same, which is no reason to take them for one expert's."""
    from safetensors.torch import save_file

    folder = copied(trained, tmp_path / "a")
    tensors = load_file(folder / FILE)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.unflatten(1, (4, 8))[:] = tensor.unflatten(1, (4, 8))[:, :, :1].clone()
    save_file(tensors, folder / FILE)
    assert ask(folder) in (None, RANK_MAJOR)
    regroup(folder, 4)
    assert ask(folder) in (None, GROUPED)


def inspect(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["action=inspect", *words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_inspect_shows_the_order_and_why(capfd: pytest.CaptureFixture[str], tmp_path: Path, trained: Path) -> None:
    _, out, _ = inspect(capfd, f"lora.path={CASE}")
    assert "columns of B in fused experts: grouped_by_expert (adapter_config.json: lora_B_layout)" in out
    _, out, _ = inspect(capfd, f"lora.path={CASE}", "format=json", "lora.layout=rank_major")
    (facts,) = json.loads(out)
    assert (facts["layout"], facts["layout_source"]) == (RANK_MAJOR, "lora.layout")
    _, out, _ = inspect(capfd, f"lora.path={trained}", "format=json")
    assert json.loads(out)[0]["layout_source"].startswith("measured: mean squared cosine between the columns of one")
    _, out, _ = inspect(capfd, f"lora.path={CASE.parent / 'tinker_shared_outer'}", "format=json")
    assert json.loads(out)[0]["layout"] is None


def test_adapters_may_have_layouts_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"lora.adapters.{name}.path={CASE}" for name in ("a", "b")]
    typed = ["lora=none", *words, "lora.layout=grouped_by_expert", "lora.adapters.b.layout=rank_major"]
    _, out, _ = inspect(capfd, *typed, "format=json")
    found = json.loads(out)
    assert {facts["name"]: facts["layout"] for facts in found} == {"a": GROUPED, "b": RANK_MAJOR}


def test_a_layout_that_is_none_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = inspect(capfd, f"lora.path={CASE}", "lora.layout=grouped")
    assert code == 2
    assert "lora.layout: got 'grouped', but " in err
    assert "Did you mean lora.layout=grouped_by_expert?" in err


def plan(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["action=plan", "format=json", "server=cpu", "model=auto", "server.fit=warn", *words]) == 0
    content: dict[str, Any] = json.loads(capfd.readouterr().out)
    return content


def test_the_plan_says_it_and_hands_it_on(capfd: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    adapters = [write_grouped(tmp_path / name, checkpoint, declared=name == "a") for name in "abc"]
    typed = [f"model.path={checkpoint}", "lora=none", *(f"lora.adapters.{one.name}.path={one}" for one in adapters)]
    typed += ["lora.adapters.b.layout=grouped_by_expert", "lora.layout=rank_major", "lora.adapters.a.layout=auto"]
    made = plan(capfd, *typed)
    shown = {name: made["resolved"][f"lora.{name}.layout"] for name in "abc"}
    assert {name: item["value"] for name, item in shown.items()} == {"a": GROUPED, "b": GROUPED, "c": RANK_MAJOR}
    assert shown["a"]["source"] == "probed: adapter_config.json: lora_B_layout"
    assert shown["b"]["source"] == "command line: lora.adapters.b.layout=grouped_by_expert"
    assert shown["c"]["source"] == "command line: lora.layout=rank_major"
    options = json.loads(made["env"]["KT_LAUNCH_LORA_OPTIONS"])
    assert options.pop("allow") == [str(adapters[0].parent)]
    assert options == {"layout": RANK_MAJOR, "layouts": {str(adapters[0]): "auto", str(adapters[1]): GROUPED}}


def test_a_server_reads_an_adapter_as_the_plan_does(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_sglang.adapters import files as adapters

    base = read_checkpoint(checkpoint)
    monkeypatch.setattr(adapters, "served_checkpoint", lambda: base)
    silent, other = (write_grouped(tmp_path / name, checkpoint, declared=False, seed=3) for name in "ab")
    options = {"layout": RANK_MAJOR, "layouts": {str(silent): GROUPED}}
    monkeypatch.setenv("KT_LAUNCH_LORA_OPTIONS", json.dumps(options))
    assert str(adapters.read_served(str(silent)).order) == GROUPED
    assert str(adapters.read_served(str(other)).order) == RANK_MAJOR
    monkeypatch.delenv("KT_LAUNCH_LORA_OPTIONS")
    (silent / FILE).touch()
    with pytest.raises((LaunchError, LaunchErrors), match=r"^lora_path: the columns of its fused experts may run"):
        adapters.read_served(str(silent))


def test_a_model_card_that_is_a_pipe_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert find_marks(tmp_path, {}) == ()
