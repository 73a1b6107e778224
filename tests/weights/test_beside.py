"""Quantized experts beside the checkpoint, as users of kt-kernel keep them: ours are found, others told."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weight_files import Ended, write_checkpoint, write_kt_kernel_folder

from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.weights.locations import own_folder
from kt_model.weights.quantizing import quantize

Launch = Callable[..., Ended]
METHOD = "int8"
NAME = "DeepSeek-V2-Lite-Chat"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / NAME)


@pytest.fixture
def planned(launch: Launch, checkpoint: Path) -> Callable[..., Ended]:
    """Plans the checkpoint with int8 experts."""
    words = ("action=plan", "format=json", "server=cpu", "model=auto", f"model.path={checkpoint}", "lora=none")
    return lambda *more: launch(*words, f"kt.method={METHOD}", *more)


def beside(checkpoint: Path, end: str = "-CPU-weight-INT8") -> Path:
    return checkpoint.with_name(checkpoint.name + end)


def make_ours(checkpoint: Path, folder: Path, method: str = METHOD) -> Path:
    quantize(ExpertSource(read_checkpoint(checkpoint)), method, folder)
    return folder


def weight_path(made: Ended) -> dict[str, Any]:
    assert made.code == 0, made.err
    content = json.loads(made.out)
    return {**content["resolved"]["kt.weight_path"], "warnings": content["warnings"]}


@pytest.mark.parametrize("end", ["-CPU-weight-INT8", "-CPU-weights-INT8", "-AMXINT8", "-CPU-weight"])
def test_ours_is_found_by_each_name(planned: Callable[..., Ended], checkpoint: Path, end: str) -> None:
    folder = make_ours(checkpoint, beside(checkpoint, end))
    source = "derived: made by kt-launch quantize, next to the model; the cache has none"
    for prepare in ("false", "true"):
        assert weight_path(planned(f"kt.prepare={prepare}")) == {"value": str(folder), "source": source, "warnings": []}


def test_the_cache_comes_before_what_lies_beside_and_says_so(
    planned: Callable[..., Ended], checkpoint: Path, cache: Path
) -> None:
    folder = make_ours(checkpoint, beside(checkpoint))
    own = make_ours(checkpoint, own_folder(ExpertSource(read_checkpoint(checkpoint)), METHOD))
    assert own.is_relative_to(cache)
    source = f"derived: made by kt-launch quantize; comes before {folder}, next to the model"
    assert weight_path(planned()) == {"value": str(own), "source": source, "warnings": []}


def test_ours_is_checked_as_any_other(planned: Callable[..., Ended], checkpoint: Path) -> None:
    folder = make_ours(checkpoint, beside(checkpoint), "int4")
    (line,) = planned().errors
    assert f"kt.weight_path: {folder} holds int4 experts, but kt.method is {METHOD}." in line
    shutil.rmtree(folder)
    make_ours(write_checkpoint(checkpoint.with_name("other"), seed=9), folder)
    (line,) = planned().errors
    assert f"{folder}: was made from other weights than those of {checkpoint}." in line
    shutil.rmtree(folder)
    make_ours(checkpoint, beside(checkpoint, "-CPU-weight"), "int4")
    assert "needs kt.weight_path (no folder given). Run" in planned().err


PACKED = "was packed by kt-kernel for its own tiles and 2 NUMA pools, which no other kernel reads"


def test_what_kt_kernel_packed_is_told_with_the_command_that_helps(
    launch: Launch, planned: Callable[..., Ended], checkpoint: Path
) -> None:
    folder = write_kt_kernel_folder(beside(checkpoint))
    (line,) = planned().errors
    problem, _, message = line.partition(" Run ")
    assert problem == f"kt.method: {METHOD} needs kt.weight_path (no folder given; {folder} {PACKED})."
    command = message.removesuffix(", or add kt.prepare=true.")
    assert launch(*shlex.split(command)[1:]).code == 0
    found = weight_path(planned())
    own = own_folder(ExpertSource(read_checkpoint(checkpoint)), METHOD)
    assert (found["value"], found["source"]) == (str(own), "derived: made by kt-launch quantize")
    assert found["warnings"] == [f"kt.weight_path: {folder} {PACKED}; using {own}"]


def test_with_prepare_the_launch_goes_on_with_ours_and_a_warning(
    planned: Callable[..., Ended], checkpoint: Path
) -> None:
    folder = write_kt_kernel_folder(beside(checkpoint))
    found = weight_path(planned("kt.prepare=true"))
    own = own_folder(ExpertSource(read_checkpoint(checkpoint)), METHOD)
    assert (found["value"], found["source"]) == (str(own), "derived: kt.prepare makes it if it is missing")
    assert found["warnings"] == [f"kt.weight_path: {folder} {PACKED}; using {own}"]


def test_its_other_layout_and_a_broken_one_are_told_too(planned: Callable[..., Ended], checkpoint: Path) -> None:
    folder = beside(checkpoint)
    (folder / "_layer_1" / "_numa_0").mkdir(parents=True)
    assert f"{folder} was packed by kt-kernel for its own tiles and 1 NUMA pool, which" in planned().err
    (folder / "moe.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert f"{folder} is not a folder of quantized experts ({folder / 'moe.safetensors'}: " in planned().err
