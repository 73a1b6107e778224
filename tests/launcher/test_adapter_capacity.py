"""Room for adapters that are loaded while the server runs, and what SGLang's own variables mean to a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import EXPERTS, HIDDEN, INNER, LAYERS, write_adapter

Launch = Callable[..., Any]
EXPERT_MODULES = ["gate_proj", "up_proj", "down_proj"]
ALL = ["o_proj", *EXPERT_MODULES]
NO_FOLDER = (
    "lora.allow: no folder is given, so that the capacity for adapters cannot be used: set "
    "lora.allow=[/path/to/adapters]"
)
ASKED = {
    "lora.max_rank=8": (8, 2, ALL),
    "lora.max_per_batch=5": (16, 5, ALL),
    "lora.target_modules=[o_proj]": (16, 2, ["o_proj"]),
    "lora.target_modules=[o_proj,up_proj]": (16, 2, ["o_proj", "up_proj", "gate_proj", "down_proj"]),
    "lora.target_modules=[gate_proj,lm_head]": (16, 2, ["gate_proj", "lm_head", "up_proj", "down_proj"]),
}


def flag(made: Any, name: str) -> list[str]:
    """The words after a flag."""
    argv: list[str] = made.plan["argv"]
    words = argv[argv.index(name) + 1 :]
    return words[: next((place for place, word in enumerate(words) if word.startswith("--")), len(words))]


@pytest.mark.parametrize("asked", ASKED)
def test_any_of_the_rooms_keys_enables_adapters_to_come(asked: str, plan: Launch) -> None:
    made = plan("lora=none", asked)
    rank, batch, modules = ASKED[asked]
    assert (made.value("lora.max_rank"), made.value("lora.max_per_batch")) == (rank, batch)
    assert made.value("lora.target_modules") == modules
    assert "--enable-lora" in made.plan["argv"]
    assert "--lora-paths" not in made.plan["argv"]
    assert (flag(made, "--max-lora-rank"), flag(made, "--max-loras-per-batch")) == ([str(rank)], [str(batch)])
    assert flag(made, "--lora-target-modules") == modules
    assert flag(made, "--lora-backend") == ["torch_native"]


def test_the_rooms_values_have_their_sources(plan: Launch) -> None:
    made = plan("lora=none", "lora.max_rank=8")
    assert made.source("lora.max_rank") == "command line: lora.max_rank=8"
    assert made.source("lora.max_per_batch") == "default: one adapter loaded later, and the base model"
    assert made.source("lora.target_modules") == "derived: all modules of deepseek_v2"
    assert (
        plan("lora=none", "lora.max_per_batch=3").source("lora.max_rank")
        == "default: capacity for adapters loaded later"
    )


def options(made: Any) -> dict[str, Any]:
    """What the server's processes are told about adapters that come later."""
    return json.loads(made.plan["env"].get("KT_LAUNCH_LORA_OPTIONS", "{}"))  # type: ignore[no-any-return]


def test_adapters_may_come_from_where_the_chosen_ones_lie(plan: Launch, adapter: Path, tmp_path: Path) -> None:
    made = plan(f"lora.path={adapter}")
    assert made.value("lora.allow") == options(made)["allow"] == [str(adapter.parent)]
    assert made.source("lora.allow") == "derived: the folders that the chosen adapters lie in"
    write_adapter(tmp_path / "run" / "checkpoint-7")
    assert plan(f"lora.path={tmp_path / 'run'}").value("lora.allow") == [str(tmp_path)]
    snapshot = write_adapter(tmp_path / "models--a--b" / "snapshots" / "0f")
    assert plan(f"lora.path={snapshot}").value("lora.allow") == [str(tmp_path / "models--a--b")]


def test_adapters_may_come_from_folders_that_are_typed(plan: Launch, adapter: Path, tmp_path: Path) -> None:
    typed = f"lora.allow=['{tmp_path}','{adapter.parent}']"
    made = plan("lora=none", typed)
    assert made.value("lora.allow") == options(made)["allow"] == [str(tmp_path), str(adapter.parent)]
    assert made.source("lora.allow") == f"command line: {typed}"
    assert "--enable-lora" in made.plan["argv"]
    none = plan(f"lora.path={adapter}", "lora.allow=[]")
    assert (none.value("lora.allow"), options(none), NO_FOLDER in none.plan["warnings"]) == ([], {}, False)
    gone = plan("lora=none", f"lora.allow=[{tmp_path / 'gone'}]")
    said = f"no folder {tmp_path / 'gone'}. Make it, or name the folder that adapters will lie in."
    assert (gone.code, gone.err) == (2, f"error: lora.allow: {said}\n")


def test_without_adapters_they_may_come_from_their_root_or_from_nowhere(
    plan: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("lora=none", "lora.max_rank=8")
    assert (made.value("lora.allow"), NO_FOLDER in made.plan["warnings"]) == ([], True)
    monkeypatch.setenv("KT_LAUNCH_LORAS", str(tmp_path))
    made = plan("lora=none", "lora.max_rank=8")
    assert (made.value("lora.allow"), NO_FOLDER in made.plan["warnings"]) == ([str(tmp_path)], False)
    assert made.source("lora.allow") == f"the adapters' root, environment: KT_LAUNCH_LORAS={tmp_path}"


def test_without_any_there_is_no_room(plan: Launch) -> None:
    made = plan("lora=none")
    assert "--enable-lora" not in made.plan["argv"]
    assert not [key for key in made.plan["resolved"] if key.startswith("lora.")]


def test_named_adapters_make_their_own_room_and_keys_add_to_it(plan: Launch, adapter: Path) -> None:
    made = plan(f"lora.path={adapter}")
    assert made.value("lora.target_modules") == sorted(EXPERT_MODULES)
    assert made.source("lora.target_modules") == "derived: the modules that the adapters change"
    more = plan(f"lora.path={adapter}", "lora.target_modules=[down_proj,o_proj]", "lora.max_rank=9")
    assert more.value("lora.target_modules") == ["down_proj", "o_proj", "gate_proj", "up_proj"]
    assert flag(more, "--max-lora-rank") == ["9"]


def test_modules_that_cannot_be_served_or_are_too_few(plan: Launch, tmp_path: Path, adapter: Path) -> None:
    unknown = plan("lora=none", "lora.target_modules=[q_proj,router]")
    assert unknown.err == (
        "error: lora.target_modules: q_proj, router cannot be served with adapters here. "
        "Choose from o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head.\n"
    )
    few = plan(f"lora.path={adapter}", "lora.target_modules=[o_proj]")
    assert few.err == (
        "error: lora.target_modules: the adapters also change down_proj, gate_proj, up_proj. "
        "Set lora.target_modules=[o_proj,down_proj,gate_proj,up_proj], or leave it out.\n"
    )


def adapter_bytes(made: Any) -> int:
    return int(made.value("fit")["host memory"]["adapters"])


def test_the_fit_counts_the_room(plan: Launch, tmp_path: Path) -> None:
    """Room for one adapter takes what that adapter would, pools of SGLang and our copies; the pools grow with slots."""
    named = plan(f"lora.path={write_adapter(tmp_path / 'west')}")
    assert named.value("lora.max_rank") == 2
    same = plan("lora=none", "lora.max_rank=2", "lora.target_modules=[gate_proj]")
    dense = 3 * 2 * 2 * 4 * HIDDEN * 2  # gate, up and down of the dense layer, which the adapter does not have: 2 slots
    assert 0 <= adapter_bytes(same) - adapter_bytes(named) <= dense
    more = plan("lora=none", "lora.max_rank=2", "lora.max_per_batch=4", "lora.target_modules=[gate_proj]")
    slot = 3 * 2 * (HIDDEN + INNER) * EXPERTS * LAYERS * 2
    assert adapter_bytes(more) - adapter_bytes(same) >= 2 * slot
    attention = plan("lora=none", "lora.max_rank=2", "lora.target_modules=[o_proj]")
    assert 0 < adapter_bytes(attention) < adapter_bytes(same)
    assert adapter_bytes(plan("lora=none")) == 0


def test_room_on_routed_experts_is_expert_lora(plan: Launch) -> None:
    made = plan("lora=none", "lora.max_rank=2")
    assert made.source("kt.num_gpu_experts") == "derived: expert LoRA needs all routed experts on the CPU"
    refused = plan("lora=none", "lora.max_rank=2", "server.extra_args=[--experts-shared-outer-loras]")
    assert "--experts-shared-outer-loras cuts the adapters' pools" in refused.err
    backend = plan("lora=none", "lora.max_rank=2", "server.lora_backend=triton")
    assert "server.lora_backend: triton needs a GPU, but server.device is cpu" in backend.err
    assert plan("lora=none", "server.lora_backend=triton").code == 0


LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


def test_a_longer_context_is_refused_with_the_way_to_allow_it(plan: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = plan("server.context_length=1024")
    assert refused.err == (
        "error: server.context_length: 1024 tokens, but the model was made for 512. Set server.context_length=512; "
        f"with {LONGER}=1 in the environment it is served anyway, unreliably.\n"
    )
    monkeypatch.setenv(LONGER, "0")
    assert plan("server.context_length=1024").err == refused.err


@pytest.mark.parametrize("yes", ["1", "True", "yes", "y"])
def test_sglangs_own_variable_is_honoured_and_handed_on(
    yes: str, plan: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LONGER, yes)
    made = plan("server.context_length=1024")
    assert flag(made, "--context-length") == ["1024"]
    assert made.plan["env"][LONGER] == "1"
    assert made.plan["warnings"] == [
        f"server.context_length: 1024 tokens, though the model was made for 512 ({LONGER} is set): "
        "answers beyond that are unreliable"
    ]
    assert LONGER not in plan().plan["env"]
    assert plan().value("server.context_length") == 512


VARIABLES = {
    "SGLANG_PLUGINS=other": "it is other: it keeps SGLang from loading the plugin that runs the experts. "
    "Add kt_sglang,kt_cpu to it, or unset it.",
    "SGLANG_PLUGINS=kt_sglang": "it is kt_sglang: it keeps SGLang from loading the plugin",
    "SGLANG_PLATFORM=other": "it is other: with another platform SGLang does not load the plugin that runs the experts",
    "SGLANG_USE_CPU_ENGINE=1": "it is 1: with it SGLang asks for sgl_kernel's CPU operators, which this server does",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS=1": "it is 1: it replaces the router's choice of experts, so every answer",
    "SGLANG_GRPC_PORT=50051": "it is 50051: with it the server answers over gRPC too",
    "SGLANG_RUST_SERVER=1": "it is 1: with it another program answers requests",
    "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS=true": "it is true: it replaces the router's choice of experts, so every",
    "SGLANG_CPU_QUANTIZATION=true": "it is true: with it SGLang quantizes the model's other weights as they are read",
    "SGLANG_EXPERIMENTAL_LORA_OPTI=1": "it is 1: it replaces the layers through which adapters reach",
}
HARMLESS = (
    "SGLANG_PLUGINS=kt_cpu, kt_sglang,other", "SGLANG_PLUGINS=", "SGLANG_PLATFORM=kt_cpu", "SGLANG_LOG_MS=1",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS=0",
)  # fmt: skip


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_that_would_make_another_server_is_refused(
    variable: str, plan: Launch, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    refused = plan(f"lora.path={adapter}")
    assert refused.code == 2
    assert refused.err.startswith(f"error: {name}: {VARIABLES[variable]}")


@pytest.mark.parametrize("variable", HARMLESS)
def test_others_are_left_to_sglang(variable: str, plan: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable.split("=", 1))
    assert plan().code == 0
