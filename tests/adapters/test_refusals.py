"""Adapters that are refused, each by name; and action=inspect, which tells and starts nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import write_checkpoint as write_model
from tiny_files import adapter_tensors, write_adapter, write_checkpoint

from kt_launch.cli import main
from kt_launch.commandline.adapter_tables import report
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError, LaunchErrors
from kt_model.importer import import_adapter
from kt_model.importer.settings import HARMLESS, READ, REFUSED

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FILE = "adapter_model.safetensors"
EXPERT = "base_model.model.model.layers.1.mlp.experts.0.gate_proj"


def problems(folder: Path, base: Path | None = None) -> str:
    """Everything that is wrong with it, in one text."""
    found = import_adapter(folder, read_checkpoint(base) if base else None)
    with pytest.raises(LaunchErrors) as raised:
        found.require_sound()
    return str(raised.value)


def with_config(folder: Path, **changes: Any) -> Path:
    return write_adapter(folder, None, **changes)


def copy_of(fixture: str, folder: Path, **changes: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """A fixture's configuration, changed, in a folder of its own; and its tensors."""
    content = json.loads((FIXTURES / fixture / "adapter_config.json").read_text())
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(content | changes))
    return folder, load_file(FIXTURES / fixture / FILE)


SETTINGS = {
    "use_dora": (True, "use_dora (DoRA)"),
    "lora_bias": (True, "lora_bias (biases on B)"),
    "bias": ("lora_only", "bias=lora_only (trained biases)"),
    "modules_to_save": (["lm_head"], "modules_to_save (whole modules next to the low-rank ones)"),
    "layer_replication": ([[0, 1]], "layer_replication (replicated layers)"),
    "trainable_token_indices": ([1], "trainable_token_indices (trained token embeddings)"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens (activated LoRA"),
    "use_qalora": (True, "use_qalora (QA-LoRA"),
    "use_bdlora": ({"x": 1}, "use_bdlora (block-diagonal LoRA)"),
    "fan_in_fan_out": (True, "fan_in_fan_out (transposed weights)"),
    "enable_lora": ([True, False, True], "enable_lora (low-rank pairs on parts of a fused matrix"),
}


@pytest.mark.parametrize("key", SETTINGS)
def test_variants_are_refused_by_name(key: str, tmp_path: Path) -> None:
    value, message = SETTINGS[key]
    text = problems(with_config(tmp_path / "a", **{key: value}))
    assert text.startswith("lora.path: adapter_config.json asks for something that is not supported: ")
    assert message in text


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    text = problems(with_config(tmp_path / "a", init_lora_weights=start))
    assert f"init_lora_weights={start} (a changed base model)" in text


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_are_taken(start: object, tmp_path: Path) -> None:
    assert import_adapter(with_config(tmp_path / "a", init_lora_weights=start)).problems == ()


def test_every_key_that_peft_writes_is_known() -> None:
    """Those of the installed version; what a newer one brings is to be put into one of the tables."""
    from peft import LoraConfig

    assert set(LoraConfig().to_dict()) - {*READ, *REFUSED, *HARMLESS} == set()


@pytest.mark.parametrize(
    "key", ["use_newlora", "lora_shift", "kept_layout", "my_scaling", "alpha_schedule", "rank_masks", "halo_config"]
)
def test_an_unknown_key_that_may_change_the_product_is_refused(key: str, tmp_path: Path) -> None:
    text = problems(with_config(tmp_path / "a", **{key: 3}))
    message = f"adapter_config.json has {key}, which is unknown and may change the result. Merge the adapter"
    assert text.startswith(f"lora.path: {message}")


def test_other_unknown_keys_are_warned_of_in_one_line(tmp_path: Path) -> None:
    found = import_adapter(with_config(tmp_path / "a", notes="x", seed=1, training_config={"lr": 1})).require_sound()
    (warning, _zeros) = (*found.warnings, "")
    assert warning == "adapter_config.json has unknown keys, which are not read: notes, seed, training_config"


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_keys_that_ask_for_nothing_are_passed_over(value: object, tmp_path: Path) -> None:
    assert import_adapter(with_config(tmp_path / "a", use_newlora=value, notes=value)).warnings == ()


def test_keys_of_other_trainers_are_known(tmp_path: Path) -> None:
    """What ms-swift adds to PEFT's."""
    swift = {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "model_key_mapping": {"a": "b"}}
    assert import_adapter(with_config(tmp_path / "a", **swift)).require_sound().warnings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "adapter_config.json says r=0, but a positive integer is expected"),
        ({"r": "8"}, "adapter_config.json says r='8', but a positive integer is expected"),
        ({"lora_alpha": None}, "adapter_config.json says lora_alpha=None, but a number is expected"),
        ({"use_rslora": "false"}, "adapter_config.json says use_rslora='false', but true or false is expected"),
        ({"rank_pattern": [8]}, "adapter_config.json: rank_pattern is [8], but names with numbers are expected"),
        ({"rank_pattern": {"(": 8}}, "adapter_config.json: rank_pattern has '(', which is no regular expression"),
        ({"rank_pattern": {"x": 0}}, "adapter_config.json: rank_pattern gives x rank 0, but a positive integer"),
        ({"alpha_pattern": {"x": "y"}}, "adapter_config.json: alpha_pattern is {'x': 'y'}, but names with numbers"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA, but LORA is expected"),
        ({"rank_pattern": {"gate_proj": 5}}, "ranks that disagree with adapter_config.json: model.layers.1."),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problems(with_config(tmp_path / "a", **changes))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{EXPERT}.lora_magnitude_vector", "1 magnitudes of DoRA in"),
        (f"{EXPERT}.lora_B.bias", "1 biases in"),
        ("base_model.model.lm_head.modules_to_save.weight", "1 whole modules in"),
        ("base_model.model.model.layers.1.input_layernorm.lora_A.weight", "1 modules that the base does not have in"),
        ("transformer.h.0.attn.lora_A.weight", "1 modules that the base does not have in"),
        ("epoch", "1 unknown keys in"),
        (f"{EXPERT}.weight", "1 unknown keys in"),
    ],
)
def test_keys_that_are_no_low_rank_pair(key: str, kind: str, tmp_path: Path) -> None:
    text = problems(write_adapter(tmp_path / "a", adapter_tensors() | {key: np.zeros(2, np.float32)}))
    assert text.startswith(f"lora.path: {kind} {FILE}: {key}. ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    tensors = adapter_tensors()
    tensors[f"{EXPERT}.lora_B.weight"][0, 0] = value
    text = problems(write_adapter(tmp_path / "a", tensors))
    assert text.startswith(f"lora.path: NaN or infinity: {EXPERT}.lora_B.weight.")


def test_finite_values_that_bfloat16_cannot_hold_once_they_are_scaled(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    tensors[f"{EXPERT}.lora_B.weight"][0, 0] = 3.3e38
    folder = write_adapter(tmp_path / "a", tensors, r=2, lora_alpha=2)
    assert import_adapter(folder).problems == ()
    text = problems(write_adapter(tmp_path / "b", tensors, r=2, lora_alpha=4))
    assert text.startswith(
        "lora.path: 1 modules beyond the range of bfloat16, in A or in B times its scale: model.layer"
    )


def test_a_pattern_that_never_ends_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", rank_pattern={"(.|..|...)*[!?]": 4})
    begun = time.monotonic()
    text = problems(folder)
    assert text.startswith(
        "adapter_config.json: the pattern '(.|..|...)*[!?]' takes more than 0.5 s for the name model."
    )
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(("side", "kind"), [("A", "B without A"), ("B", "A without B")])
def test_half_a_pair(side: str, kind: str, tmp_path: Path) -> None:
    tensors = adapter_tensors()
    del tensors[f"{EXPERT}.lora_{side}.weight"]
    text = problems(write_adapter(tmp_path / "a", tensors))
    assert text.startswith(f"lora.path: {kind}: model.layers.1.mlp.experts.0.gate_proj.")


def test_two_keys_for_one_module(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    tensors[f"{EXPERT}.lora_A.default.weight"] = tensors[f"{EXPERT}.lora_A.weight"]
    assert "keys that mean the same module: " in problems(write_adapter(tmp_path / "a", tensors))


def test_integers_are_no_adapter(tmp_path: Path) -> None:
    tensors = {name: tensor.astype(np.int8) for name, tensor in adapter_tensors().items()}
    folder = write_adapter(tmp_path / "a", tensors)
    assert f"{len(tensors)} tensors of dtype I8, expected one of BF16, F16, F32: base_model." in problems(folder)
    assert report(import_adapter(folder), None)["keys"]["refused"] == len(tensors)


def test_one_fused_expert_file_with_half_a_pair(tmp_path: Path) -> None:
    folder, tensors = copy_of("b_qwen3_moe_0212", tmp_path / "a")
    del tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    save_file(tensors, str(folder / FILE))
    assert "A without B: model.layers.1.mlp.experts." in problems(folder)


def square(fixture: str, folder: Path, version: str | None) -> Path:
    """A fused gate_up alone where hidden size = 2 · inner size: both layouts have the same shapes."""
    folder, _ = copy_of(fixture, folder, peft_version=version, target_parameters=["experts.gate_up_proj"])
    stem = "base_model.model.model.layers.1.mlp.experts"
    rng = np.random.default_rng(0)
    pair = {f"{stem}.lora_A.weight": (8, 80), f"{stem}.lora_B.weight": (80, 8)}
    save_file({name: rng.normal(size=shape).astype("f") for name, shape in pair.items()}, str(folder / FILE))
    return folder


def test_an_ambiguous_fused_layout_is_refused(tmp_path: Path) -> None:
    text = problems(square("b_gate_up_only", tmp_path / "a", None))
    assert "its fused expert tensors fit two layouts, and adapter_config.json has no peft_version to decide." in text


@pytest.mark.parametrize(("version", "transposed"), [("0.18.1", True), ("0.19.1", False), ("0.21.2", False)])
def test_the_version_decides_between_layouts_of_one_shape(version: str, transposed: bool, tmp_path: Path) -> None:
    folder = square("b_gate_up_only", tmp_path / "a", version)
    imported = import_adapter(folder).require_sound()
    tensors = load_file(folder / FILE)
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.experts.lora_{side}.weight"] for side in "AB")
    a, b = a.reshape(4, 2, 80)[1], b.reshape(80, 2, 4)[:, :, 1]
    delta = 3 * ((b @ a).T if transposed else b @ a)
    found = np.concatenate([imported.pairs[f"layers.1.experts.1.{part}"].delta() for part in ("gate", "up")])
    np.testing.assert_allclose(found, delta, rtol=0, atol=1e-4)


def test_a_layout_that_the_version_contradicts_is_told(tmp_path: Path) -> None:
    folder, tensors = copy_of("b_qwen3_moe_0181", tmp_path / "a", peft_version="0.21.2")
    save_file(tensors, str(folder / FILE))
    (warning,) = import_adapter(folder).warnings
    assert warning == "fused experts have the layout of peft < 0.19, although peft_version is 0.21.2"


def test_fused_experts_of_another_number(base_of: Callable[[Path], Any], tmp_path: Path) -> None:
    fixture = FIXTURES / "b_qwen3_moe_0212"
    folder, tensors = copy_of(fixture.name, tmp_path / "a")
    cut = {name: tensor[:4] if "lora_A" in name else tensor[:, :4] for name, tensor in tensors.items()}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in cut.items()}, str(folder / FILE))
    text = str(import_adapter(folder, base_of(fixture)).problems[0])
    assert "has 4 rows and B 4 columns, expected 4 experts of rank 2." in text


@pytest.mark.parametrize("name", ["a_deepseek_v2_0212", "b_qwen3_moe_0212", "kt_training"])
def test_an_adapter_of_another_family_does_not_fit(name: str, base_of: Callable[[Path], Any], tmp_path: Path) -> None:
    other = read_checkpoint(write_checkpoint(tmp_path / "m", "mixtral"))
    assert import_adapter(FIXTURES / name, other).problems
    assert not import_adapter(FIXTURES / name, base_of(FIXTURES / name)).problems


def test_zero_b_is_warned_of(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    some = {**tensors, f"{EXPERT}.lora_B.weight": np.zeros((16, 2), np.float32)}
    (warning,) = import_adapter(write_adapter(tmp_path / "some", some)).warnings
    assert warning == "B is zero in 1 of 24 modules: model.layers.1.mlp.experts.0.gate_proj"
    all_zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    (warning,) = import_adapter(write_adapter(tmp_path / "all", all_zero)).warnings
    assert warning.startswith("every B is zero: the adapter does nothing")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("model.layers", "language_model.model.layers"),
        lambda key: key.replace("mlp.experts", "mlp.original_moe.experts"),
        lambda key: key.replace(".lora_", ".orig_module.lora_"),
    ],
)
def test_names_that_wrappers_left_mean_the_same(change: Callable[[str], str], tmp_path: Path) -> None:
    plain = import_adapter(write_adapter(tmp_path / "plain")).pairs
    changed = {change(name): tensor for name, tensor in adapter_tensors().items()}
    assert import_adapter(write_adapter(tmp_path / "a", changed)).require_sound().pairs.keys() == plain.keys()


# ---- whole embeddings, which PEFT saves beside the pairs on them


def with_embeddings(checkpoint: Path, folder: Path, dtype: str, change: Callable[[Any], None] = lambda _: None) -> Path:
    """What PEFT itself writes when embed_tokens and lm_head are among its targets."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "o_proj"], init_lora_weights="gaussian")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        change(adapted)
    adapted.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3_moe", tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_that_are_the_bases_are_left_out(dtype: str, model: Path, tmp_path: Path) -> None:
    folder = with_embeddings(model, tmp_path / "a", dtype)
    assert sum("base_layer" in name for name in load_keys(folder)) == 2
    imported = import_adapter(folder, read_checkpoint(model)).require_sound()
    assert sum(imported.keys.values()) == len(load_keys(folder))
    assert imported.keys["embeddings"] == 6
    assert {"embed_tokens", "lm_head"} <= imported.pairs.keys()
    warning, _of_zeros = import_adapter(folder).warnings
    assert warning.endswith("cannot be compared with the base, since none is given")


def test_embeddings_that_were_trained_as_a_whole_are_refused(model: Path, tmp_path: Path) -> None:
    def train(adapted: Any) -> None:
        adapted.base_model.model.lm_head.base_layer.weight[3, 5] += 1

    text = problems(with_embeddings(model, tmp_path / "a", "float32", train), model)
    key = "base_model.model.lm_head.base_layer.weight"
    assert f"embeddings that are not the base's, but trained or resized as a whole: {key}. Train" in text


def load_keys(folder: Path) -> list[str]:
    with safe_open(str(folder / FILE), "np") as opened:
        return list(opened.keys())


# ---- action=inspect


def inspect(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["action=inspect", *words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_inspect_prints_a_list_alone(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capfd, f"lora.path={FIXTURES / 'a_all_linear'}", "format=json")
    (facts,) = json.loads(out)
    assert code == 0
    assert facts["format"] == "A"
    keys = facts["keys"]
    assert keys["total"] == len(load_file(FIXTURES / "a_all_linear" / FILE))
    assert keys["total"] == sum(count for name, count in keys.items() if name != "total")
    assert (keys["routed_experts"], keys["shared_experts"], keys["attention"], keys["router"]) == (48, 16, 16, 4)
    assert facts["not_served"].keys() == {"router", "shared_expert_gate"}
    assert (facts["scale"], facts["layers"], facts["zero_filled"]) == (3.0, [0, 1], 0)
    (message,) = facts["warnings"]
    assert (
        message == "expected.safetensors looks like weights and is not read; the adapter is adapter_model.safetensors"
    )
    assert facts["ranks"]["gate"] == [2]


def test_inspect_shows_tables(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = inspect(capfd, f"lora.path={FIXTURES / 'a_patterns'}")
    assert code == 0
    assert "format A, per expert; " in out
    assert "layers 0-1: 4 of 4 experts each" in out
    assert "gate" in out
    assert "2, 5" in out


def test_inspect_says_once_what_to_type_for_all_that_is_not_served(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = inspect(capfd, f"lora.path={FIXTURES / 'a_all_linear'}")
    assert out.count("not served: ") == 2
    assert out.count("lora.ignore=") == out.count("lora.ignore=[router,shared_expert_gate] serves the rest") == 1


def test_inspect_shows_no_table_of_what_it_could_not_read(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, _ = copy_of("a_down_only", tmp_path / "a")
    (folder / FILE).write_bytes((FIXTURES / "a_down_only" / FILE).read_bytes()[:500])
    code, out, err = inspect(capfd, f"lora.path={folder}")
    assert (code, out) == (2, "")
    assert f"{folder / FILE}: truncated: its header is " in err


@pytest.mark.parametrize("target", [FILE, "gone"])
def test_a_link_that_leads_nowhere_is_named(target: str, tmp_path: Path) -> None:
    folder, _ = copy_of("a_down_only", tmp_path / "a")
    (folder / FILE).symlink_to(target)
    with pytest.raises(LaunchError, match=f"{FILE}: is a broken link"):
        import_adapter(folder)


def test_the_same_unknown_key_in_two_files_counts_twice(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    folder, known = shutil.copytree(FIXTURES / "kt_training", tmp_path / "a"), 0
    for file in (folder / FILE, folder / "fused_expert_lora.safetensors"):
        tensors = load(file)
        known += len(tensors)
        save(tensors | {"epoch": torch.zeros(1)}, file)
    _, out, _ = inspect(capfd, f"lora.path={folder}", "format=json")
    keys = json.loads(out)[0]["keys"]
    assert (keys["refused"], keys["total"]) == (2, known + 2)


def test_inspect_holds_it_against_a_base_that_is_typed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "m", "mixtral")
    words = ["model=auto", f"model.path={base}", f"lora.path={FIXTURES / 'a_mixtral_0212'}", "format=json"]
    code, out, err = inspect(capfd, *words)
    assert code == 2
    assert "dimensions that do not fit the base" in err
    assert json.loads(out)[0]["errors"]


def test_inspect_counts_what_it_refuses(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", adapter_tensors() | {"epoch": np.zeros(1, np.float32)})
    code, out, err = inspect(capfd, f"lora.path={folder}", "format=json")
    assert code == 2
    assert json.loads(out)[0]["keys"]["refused"] == 1
    assert "1 unknown keys in adapter_model.safetensors: epoch." in err


def test_norms_are_those_of_the_deltas() -> None:
    imported = import_adapter(FIXTURES / "a_rslora")
    norms = [float(np.linalg.norm(pair.delta())) for pair in imported.of_kind("shared_experts")]
    facts = report(imported, None)["delta_norms"]["shared_experts"]
    assert facts["largest"] == pytest.approx(max(norms), rel=1e-5)
    assert facts["smallest"] == pytest.approx(min(norms), rel=1e-5)
