"""The bugs that cost a day each, by their row: the plan's part of never meeting them again."""

from __future__ import annotations

import gc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tiny_files import write_checkpoint

from kt_model.checkpoint import read_checkpoint
from kt_model.importer import import_adapter
from kt_model.methods import METHODS

Launch = Callable[..., Any]


def argument(ended: Any, flag: str) -> str:
    argv = ended.plan["argv"]
    return str(argv[argv.index(flag) + 1])


def test_bug_1_num_gpu_experts_is_never_none(plan: Launch, adapter: Path) -> None:
    made = plan(f"lora.path={adapter}", "kt.num_gpu_experts=null")
    assert made.value("kt.num_gpu_experts") == 0
    assert made.source("kt.num_gpu_experts") == "derived: expert LoRA needs all routed experts on the CPU"
    assert argument(made, "--kt-num-gpu-experts") == "0"


def test_bug_2_cpuinfer_and_pools_are_never_none(plan: Launch) -> None:
    made = plan("kt.cpuinfer=null", "kt.threadpool_count=null")
    assert int(argument(made, "--kt-cpuinfer")) >= 1
    assert int(argument(made, "--kt-threadpool-count")) >= 1
    assert made.source("kt.cpuinfer").startswith("probed: ")
    assert made.source("kt.threadpool_count").startswith("probed: ")


def test_bug_3_each_method_has_one_source_of_base_weights(plan: Launch, adapter: Path, checkpoint: Path) -> None:
    for method, row in METHODS.items():
        for overrides in ((), (f"lora.path={adapter}",)):
            found = argument(plan(f"kt.method={method}", "kt.prepare=true", *overrides), "--kt-weight-path")
            assert (found == str(checkpoint)) == (not row.quantized) == (method == "bf16")


def test_bug_4_reading_checkpoint_and_adapter_leaves_no_file_open(checkpoint: Path, adapter: Path) -> None:
    before = {file.path for file in psutil.Process().open_files()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        base = read_checkpoint(checkpoint)
        imported = import_adapter(adapter, base, where="lora.path").require_sound()
        assert len(imported.experts) > 0
        del imported  # its tensors are views of the mapped file
        gc.collect()
    assert {file.path for file in psutil.Process().open_files()} <= before


def test_bug_5_a_pickle_named_safetensors_in_the_checkpoint_folder_is_named(launch: Launch, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    with zipfile.ZipFile(folder / "moe_lora.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    ended = launch("action=plan", "model=auto", "server=cpu", f"model.path={folder}")
    assert ended.code == 2
    assert f"{folder / 'moe_lora.safetensors'}: a torch pickle (zip archive), but a safetensors" in ended.err


def test_bug_6_cuda_graph_is_off_under_expert_lora_and_says_why(plan: Launch, adapter: Path) -> None:
    made = plan(f"lora.path={adapter}")
    assert made.value("server.cuda_graph") == "off"
    assert made.source("server.cuda_graph") == "derived: CPU experts cannot run inside a CUDA graph"
    assert made.plan["warnings"] == [], "without a GPU there is nothing to warn of"
    assert plan().plan["warnings"] == []
