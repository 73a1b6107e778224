"""Float8 checkpoints in every form that hubs have them in: refused by the plan with a command that makes them servable,
and what that command makes is each code times its scale, to the bit.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from float8_checkpoints import FORMS, WHOLE, is_linear, write_float8
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from weight_files import Ended

from kt_model.checkpoint import read_checkpoint
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource, float32_of

Launch = Callable[..., Ended]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bfloat16."""
    return write_checkpoint("deepseek_v2", tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("form", FORMS)
def test_what_the_plan_tells_to_type_makes_the_weights(form: str, plain: Path, launch: Launch, tmp_path: Path) -> None:
    exact = write_float8(form, plain, tmp_path / "m")
    words = ("action=plan", "model=auto", "lora=none")
    refused = launch(*words, f"model.path={tmp_path / 'm'}")
    assert refused.code == 2
    message = re.search(r"the checkpoint is quantized \(\S+\)\. Use .*; kt-launch (.*) makes it\.", refused.err)
    assert message is not None, refused.err
    made = launch(*shlex.split(message[1]))
    assert made.code == 0, made.err
    copy = tmp_path / "m-BF16"
    found, original = load_file(copy / WHOLE), load_file(plain / WHOLE)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], exact[name].to(original[name].dtype)) for name in original)
    assert any(not torch.equal(found[name], original[name]) for name in original)
    assert json.loads((copy / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert not (copy / "hf_quant_config.json").exists()
    served = launch(*words, f"model.path={copy}")
    assert served.code == 0, served.err


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_quantized_from_their_values(form: str, plain: Path, tmp_path: Path) -> None:
    exact = write_float8(form, plain, tmp_path / "m")
    source = ExpertSource(read_checkpoint(tmp_path / "m", float8=True))
    for part, name in zip(("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj"), strict=True):
        expected = exact[f"model.layers.1.mlp.experts.5.{name}.weight"].to(torch.bfloat16).float()
        assert torch.equal(torch.from_numpy(float32_of(source.read(1, 5)[part])), expected)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (64, 2)])
def test_scales_of_no_known_form_are_not_promised_to_be_merged(
    shape: tuple[int, ...], plain: Path, launch: Launch, tmp_path: Path
) -> None:
    write_float8("autofp8", plain, tmp_path / "m")
    file = tmp_path / "m" / WHOLE
    tensors = load_file(file)
    strange = {name: torch.ones(shape) for name in tensors if name.endswith("weight_scale") and ".experts." in name}
    save_file(tensors | strange, file)
    words = ("model=auto", "lora=none", f"model.path={tmp_path / 'm'}")
    (line,) = launch("action=plan", *words).errors
    assert line == "model.path: the checkpoint is quantized (fp8). Use the bfloat16 checkpoint of this model."
    (line,) = launch("action=merge", *words, f"merge.path={tmp_path / 'out'}").errors
    assert f"has shape {list(shape)}, which is not a scale per tensor, row or block of [128, 128] of " in line
    assert not list(tmp_path.glob("out*"))


def test_quantized_weights_of_other_types_are_not_promised_to_be_merged(
    plain: Path, launch: Launch, tmp_path: Path
) -> None:
    """Packed int4 of compressed-tensors: other names, other types."""
    write_float8("channel", plain, tmp_path / "m")
    file = tmp_path / "m" / WHOLE
    packed = {
        name.replace(".weight", ".weight_packed") if is_linear(name) else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(packed, file)
    for action in ("plan", "quantize", "merge"):
        words = ("model=auto", "lora=none", "kt=int8", f"model.path={tmp_path / 'm'}", f"merge.path={tmp_path / 'out'}")
        (line,) = launch(f"action={action}", *words).errors
        message = "the checkpoint is quantized (compressed-tensors). Use the bfloat16 checkpoint of this model."
        assert line == f"model.path: {message}"


@pytest.mark.parametrize("block", [[128], "128", [0, 128]])
def test_a_block_that_is_none(block: object, plain: Path, tmp_path: Path) -> None:
    write_float8("deepseek", plain, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_block_size"] = block
    file.write_text(json.dumps(config))
    with pytest.raises(LaunchError, match=r"weight_block_size is .*, expected two numbers"):
        read_checkpoint(tmp_path / "m", float8=True)
