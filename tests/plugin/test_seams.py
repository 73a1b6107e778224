"""The installed SGLang is the one that the plugin knows, and the plugin is inert where it was not asked for."""

from __future__ import annotations

import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_checkpoint

from kt_launch.machine.ports import OWN_PORTS
from kt_model.checkpoint import read_checkpoint
from kt_sglang.edge import SEAMS as EDGE_SEAMS
from kt_sglang.hooks import GPU_SEAMS, SEAMS
from kt_sglang.seam_check import SIGNATURES, moved_signatures
from kt_sglang.without_gpu import SEAMS as CPU_SEAMS

FORKING = """
import gc, json, os, sys, traceback
gc.disable()
from kt_sglang.without_gpu import torchvision_shim
torchvision_shim.install_if_needed()
import sglang.launch_server, sglang.srt.managers.scheduler  # most of the time; a server has them before hooks act

def run(code):
    try:
        exec(code, {})
    except SystemExit as ended:
        print(ended)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for name, code in json.loads(sys.argv[1]).items():
    told, telling = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(telling, 1), os.dup2(telling, 2)
        ended = run(code)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(ended)
    os.close(telling)
    with open(told) as pipe:
        said = pipe.read()
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""
OURS = """
import kt_sglang
kt_sglang.activate()
from sglang.srt.plugins import load_plugins
load_plugins()
"""
PROCESSES = {
    "ours": OURS
    + """
import sys
from kt_sglang.hooks import active_seams, missing_hooks
assert len(active_seams()) >= 5
assert missing_hooks() == [], missing_hooks()
from sglang.srt.layers.moe.fused_moe_triton.layer import KTEPWrapperMethod
assert KTEPWrapperMethod.__module__ == "kt_sglang.experts.method"
import types
from kt_sglang.seams.imports import resolve
replaced = {}
for seam in active_seams():
    one = resolve(seam.target)
    while one := getattr(one, "__wrapped__", None):
        replaced[id(one)] = seam.target
modules = [module for module in sys.modules.values() if isinstance(module, types.ModuleType)]
names = [(name, value) for module in modules for name, value in list(vars(module).items())]
assert len(replaced) >= 5 and not [(name, replaced[id(value)]) for name, value in names if id(value) in replaced]
""",
    "shared": """
import os
os.environ["KT_LAUNCH_START"] = "0123456789abcdef" * 2
"""
    + OURS
    + """
import multiprocessing, sglang.srt.distributed.device_communicators.shm_broadcast as broadcasts
from kt_sglang import server
from kt_sglang.process import shared_names
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
shared_names.name_semaphores()
memory = SharedMemory(create=True, size=16, name=broadcasts.make_shm_name("mq"))
semaphore = multiprocessing.get_context("spawn").Lock()
print("names:", *[path.name for path in Path("/dev/shm").iterdir() if os.environ["KT_LAUNCH_START"] in path.name])
memory.close(), memory.unlink()
""",
    "models": """
from kt_model.families import FAMILIES
from kt_sglang import model_classes
model_classes.name_package()
from sglang.srt.models.registry import ModelRegistry
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
for family in FAMILIES:
    assert ModelRegistry.is_arch_supported(NAMES[family])
    assert ModelRegistry.resolve_model_cls([NAMES[family]])[1] == NAMES[family]
assert not ModelRegistry._default_models_loaded and len(ModelRegistry.models) < 20
assert not ModelRegistry.is_arch_supported("NobodyForCausalLM")
assert ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])[0].__module__ == "sglang.srt.models.llama"
assert len(ModelRegistry.models) > 100
""",
    "templates": OURS
    + """
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.parser.conversation import get_conv_template_by_model_path
for place in ("home/janus/models", "mnt/check-points", "data/unlimited", "whisper", "vicuna"):
    assert get_conv_template_by_model_path(f"/{place}/qwen"), "the hook on its guesses can go"
    manager = TemplateManager()
    manager.guess_chat_template_from_model_path(f"/{place}/qwen")
    assert manager.chat_template_name is None, place
""",
    "plain": """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.moe.fused_moe_triton.layer import KTEPWrapperMethod
from sglang.srt.lora.layers import FusedMoEWithLoRA
assert KTEPWrapperMethod.__module__ == "sglang.srt.layers.moe.kt_ep_wrapper"
assert FusedMoEWithLoRA.__module__ == "sglang.srt.lora.layers"
""",
    "other": OURS
    + """
import sglang.srt.lora.layers as layers
layers.FusedMoEWithLoRA = type("Other", (), {})
from kt_sglang.hooks import require_hooks
require_hooks()
""",
    "look": """
import runpy
runpy.run_module("kt_sglang.seam_check", run_name="__main__")
""",
    "shapes": """
import re, torch
from pathlib import Path
from kt_sglang.without_gpu import primitive_cache
primitive_cache.bound()
torch.set_num_threads(1)
weight, kept = torch.ones(64, 64, dtype=torch.bfloat16), []
for tokens in range(1, 601):
    torch.nn.functional.linear(torch.ones(tokens, 64, dtype=torch.bfloat16), weight)
    kept.append(int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
print((kept[599] - kept[299]) / 1024)
""",
    "shadows": """
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in ("plugins", "conf", "launcher"))
spec = importlib.util.find_spec("kernels")
assert spec is None or "kt_" not in str(spec.origin)
""",
}


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[int, str]]:
    """Exit code and output of each process; hooks patch SGLang for good, so each has one of its own."""
    command = [sys.executable, "-P", "-c", FORKING, json.dumps(PROCESSES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {name: (code, said) for name, code, said in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


def test_no_function_of_sglang_has_two_hooks_around_it() -> None:
    """SGLang would warn of them in the log of every start: one of ours could skip the other."""
    around = [seam.target for seam in (*SEAMS, *EDGE_SEAMS, *GPU_SEAMS, *CPU_SEAMS) if seam.kind == "AROUND"]
    assert len(around) > 30
    assert [target for target in sorted(set(around)) if around.count(target) > 1] == []


@pytest.mark.parametrize("path", SIGNATURES)
def test_sglang_has_the_signature_we_rely_on(path: str) -> None:
    found = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
    assert found[: len(SIGNATURES[path])] == SIGNATURES[path]


ROPES = {
    "none": None,
    "yarn": {"type": "yarn", "factor": 4.0},
    "yarn, counted already": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "no factor": {"rope_type": "default"},
}


@pytest.mark.parametrize("length", [{}, {"model_max_length": 256}, {"seq_length": 1024, "model_max_length": 256}])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", ROPES)
def test_the_longest_context_is_the_one_that_sglang_allows(
    rope: str, key: str, length: dict[str, int], tmp_path: Path
) -> None:
    from sglang.srt.utils.hf_transformers.common import get_context_length
    from transformers import AutoConfig

    changes: dict[str, Any] = {key: ROPES[rope], **length}
    model = write_checkpoint(tmp_path / "model", "qwen3_moe", **changes)
    assert read_checkpoint(model).max_position == get_context_length(AutoConfig.from_pretrained(model))


def test_a_function_with_other_parameters_is_named() -> None:
    path = "sglang.srt.lora.lora_config.LoRAConfig.get_lora_config"
    said = list(moved_signatures({path: ["self", "path"], "sglang.srt.lora.gone": []}))
    assert said[0] == f"{path} takes (self, dummy), expected (self, path, ...)"
    assert said[1].startswith("sglang.srt.lora.gone is gone (")
    assert len(said) == 2


def test_lora_manager_tells_layers_about_changed_slots() -> None:
    from sglang.srt.lora.lora_manager import LoRAManager

    assert "on_lora_slots_updated" in inspect.getsource(LoRAManager._notify_lora_slots_updated)


def test_all_hooks_stand_in_a_process_of_ours(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["ours"]
    assert code == 0, said


def test_names_in_shared_memory_bear_the_number_of_the_start(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["shared"]
    assert code == 0, said
    number = "0123456789abcdef" * 2
    (names,) = [line for line in said.splitlines() if line.startswith("names: ")]  # its tracker may speak after it
    found = sorted(names.split()[1:])
    assert [name.rpartition(number)[0] for name in found] == ["sem.mp-", "sgl_shm_mq_"], said
    memory = found[1].rpartition(f"{number}_")[2].split("_")
    assert len(memory) == 2 and memory[0].isdecimal(), "SGLang reads the process's number from behind"


def test_batches_of_ever_other_sizes_do_not_grow_a_server(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["shapes"]
    assert code == 0, said
    grown_mib = float(said.splitlines()[-1])
    assert grown_mib < 40, "300 numbers of tokens after 300 others; 160 without a bound"


def test_models_of_the_families_are_found_without_looking_at_all_others(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["models"]
    assert code == 0, said


def test_the_path_of_a_model_chooses_no_chat_template(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["templates"]
    assert code == 0, said


def test_a_look_at_sglang_finds_every_seam(ended: dict[str, tuple[int, str]]) -> None:
    """As `kt-launch doctor` reads it, which has one of its own at night: tests/launcher/test_doctor.py."""
    code, said = ended["look"]
    report = json.loads(said.splitlines()[-1])
    assert (code, report["not_imported"], report["mistakes"]) == (0, [], [])
    assert report["seams"] >= 5


def test_sglang_takes_its_ports_from_others_than_the_launcher_does() -> None:
    from sglang.srt.utils.network import get_free_port_below_ephemeral as taken

    assert inspect.signature(taken).parameters["low"].default >= OWN_PORTS.stop


def test_a_plain_sglang_process_stays_plain(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["plain"]
    assert code == 0, said


def test_a_hook_that_sglang_did_not_take_is_named(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["other"]
    assert code == 1
    assert "did not take these hooks: sglang.srt.lora.layers.FusedMoEWithLoRA" in said
    assert "Traceback" not in said


def test_no_package_of_ours_shadows_one_that_sglang_needs(ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended["shadows"]
    assert code == 0, said
