"""What a config and a machine resolve to, and where each value says it came from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from tiny_files import adapter_tensors, write_adapter, write_checkpoint

from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import Gpu, Host, read_host
from kt_launch.machine.ports import Port
from kt_launch.planning.memory_fit import COMING
from kt_launch.planning.resolve import resolve
from kt_model.checkpoint import read_checkpoint
from kt_model.contract import EXPERT_PROFILE, GPU_PREFILL, RECORD_EXPERTS
from kt_model.errors import LaunchErrors, Problems
from kt_model.expert_profile import write_profile
from kt_model.families import FAMILIES
from kt_model.plan import LaunchPlan

Launch = Callable[..., Any]
RESOLVED = {
    "model.path", "model.family", "kt.method", "kt.weight_path", "kt.cpuinfer", "kt.threadpool_count",
    "kt.num_gpu_experts", "server.device", "server.host", "server.port", "server.attention_backend",
    "server.sampling_backend", "server.lora_backend", "server.cuda_graph", "lora.west.rank", "lora.west.alpha",
    "lora.west.path",
}  # fmt: skip


def config(**sections: Any) -> Config:
    made, mistakes = validate(sections)
    assert mistakes == []
    return made


def planned(made: Config, host: Host) -> LaunchPlan:
    """The plan of a config on a machine of the test's choice."""
    problems = Problems()
    facts = read_facts(made, Sources(), problems, host)
    return resolve(made, replace(facts, port=Port(30000, True)), Sources(), problems)


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    return read_host(Machine(nodes=2, cores=8).write(tmp_path / "machine"))


@pytest.fixture
def gpu_machine(machine: Host) -> Host:
    return replace(machine, gpus=(Gpu(0, "NVIDIA Test", 1 << 36, 1 << 36),), cuda_torch=True)


@pytest.fixture
def two_gpus(gpu_machine: Host) -> Host:
    return replace(gpu_machine, gpus=(*gpu_machine.gpus, Gpu(1, "B", 1 << 36, 1 << 36)))


def on_cores(count: int, host: Host) -> Host:
    """The host with so many cores on one NUMA node."""
    cpus = frozenset(range(count))
    node = replace(host.nodes[0], cpus=cpus)
    return replace(host, cores=tuple(frozenset({cpu}) for cpu in cpus), affinity=cpus, nodes=(node,), quota_cpus=None)


@pytest.mark.parametrize("typed", ["bf16", "BF16", "AMXBF16_SFT"])
def test_a_methods_names_mean_the_same(typed: str, machine: Host, checkpoint: Path) -> None:
    made = planned(config(model={"path": str(checkpoint)}, kt={"method": typed}), machine)
    assert (made.value("kt.method"), made.config["kt"]["method"]) == ("bf16", "bf16")
    assert made.argv[made.argv.index("--kt-method") + 1] == "AMXBF16_SFT"
    recorded = made.to_json().replace('"bf16"', f'"{typed}"')
    assert LaunchPlan.from_json(recorded) == made


def test_the_json_has_the_promised_shape(plan: Launch, adapter: Path) -> None:
    content = plan(f"lora.path={adapter}").plan
    assert set(content) == {"config", "resolved", "argv", "env", "warnings"}
    assert set(content["resolved"]) >= RESOLVED
    assert all(set(item) == {"value", "source"} for item in content["resolved"].values())
    assert content["argv"][:4] == [sys.executable, "-P", "-m", "kt_sglang.server"]
    assert all(type(word) is str for word in content["argv"])
    assert content["env"]["OMP_NUM_THREADS"] == "1"


def test_a_plan_reads_back_as_it_was_written(machine: Host, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    made = planned(config(model={"path": str(checkpoint)}, lora={"path": str(adapter)}), machine)
    made.write(tmp_path / "plan.json")
    assert LaunchPlan.read(tmp_path / "plan.json") == made
    assert (tmp_path / "plan.json").stat().st_mode & 0o077 == 0


def test_the_expert_arguments_carry_the_resolved_values(machine: Host, checkpoint: Path) -> None:
    argv = planned(config(model={"path": str(checkpoint)}), machine).argv
    words = " ".join(argv)
    assert f"--kt-weight-path {checkpoint} --kt-method AMXBF16_SFT --kt-cpuinfer 16" in words
    assert "--kt-threadpool-count 2 --kt-num-gpu-experts 0" in words
    assert "--enable-lora" not in argv


def test_adapters_are_named_with_room_for_all_and_the_bare_model(
    machine: Host, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    wide = write_adapter(tmp_path / "wide", adapter_tensors(rank=6), r=6)
    lora = {"adapters": {"west": {"path": str(adapter)}, "wide": {"path": str(wide)}}}
    made = planned(config(model={"path": str(checkpoint)}, lora=lora), machine)
    words = " ".join(made.argv)
    assert f"--lora-paths west={adapter} wide={wide} --max-lora-rank 6 --max-loras-per-batch 3" in words
    assert (made.value("lora.west.rank"), made.value("lora.west.alpha"), made.value("lora.west.scale")) == (2, 8.0, 4.0)


def test_the_scale_of_an_rslora_adapter(machine: Host, checkpoint: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "rs", adapter_tensors(rank=4), r=4, use_rslora=True)
    made = planned(config(model={"path": str(checkpoint)}, lora={"path": str(path)}), machine)
    assert made.value("lora.rs.scale") == 8 / 4**0.5


def test_experts_that_an_adapter_leaves_out_are_targets_too(machine: Host, checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in adapter_tensors().items() if "down_proj" in name}
    path = write_adapter(tmp_path / "down", tensors, target_modules=["down_proj"])
    made = planned(config(model={"path": str(checkpoint)}, lora={"path": str(path)}), machine)
    pairs = len(tensors) // 2
    assert made.value("lora.down.reaches") == f"{pairs} pairs on routed experts"
    assert made.value("lora.down.expert_pairs") == pairs and made.reaches_experts("down")
    place = made.argv.index("--lora-target-modules") + 1
    assert made.argv[place : place + 3] == ("down_proj", "gate_proj", "up_proj")


def test_metrics_bring_sglangs_along(machine: Host, checkpoint: Path) -> None:
    model = {"path": str(checkpoint)}
    assert "--enable-metrics" not in planned(config(model=model), machine).argv
    for extra in ([], ["--enable-metrics"]):
        made = planned(config(model=model, server={"metrics_port": 0, "extra_args": extra}), machine)
        assert made.argv.count("--enable-metrics") == 1
        assert made.env["KT_LAUNCH_PROFILE"] == "1"


def test_a_gpu_is_taken_when_there_is_one(gpu_machine: Host, checkpoint: Path, adapter: Path) -> None:
    made = planned(config(model={"path": str(checkpoint)}, lora={"path": str(adapter)}), gpu_machine)
    assert made.resolved["server.device"].source == "probed: NVIDIA Test"
    words = " ".join(made.argv)
    assert "--device cuda" in words
    assert (
        "--cuda-graph-bs-decode 1 2 4 8 16 32 64 128 256 --disable-prefill-cuda-graph --disable-shared-experts-fusion"
        in words
    )
    assert "--lora-backend triton" in words
    assert "--attention-backend" not in words
    assert made.env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert made.resolved["server.cuda_graph"].value == "decode"
    assert not any("cuda_graph" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ({}, {"tokens": None, "bytes": None}),
        ({"gpu_prefill_tokens": 700}, {"tokens": 700, "bytes": None}),
        ({"gpu_prefill_gib": 0.5}, {"tokens": None, "bytes": 1 << 29}),
        ({"gpu_prefill_gib": 0.5, "num_gpu_experts": 3}, {"tokens": None, "bytes": 1 << 29}),
        ({"gpu_prefill_tokens": "off"}, None),
        ({"record_experts": "counts.json"}, {"tokens": None, "bytes": None}),
        ({"gpu_prefill_tokens": "auto"}, {"tokens": None, "bytes": None}),
        ({"method": "int4", "prepare": True}, {"tokens": None, "bytes": None}),
    ],
    ids=str,
)
def test_experts_come_to_a_gpu_for_long_prompts(
    typed: dict[str, Any], asked: Any, gpu_machine: Host, checkpoint: Path
) -> None:
    made = planned(config(model={"path": str(checkpoint)}, kt=typed), gpu_machine)
    assert json.loads(made.env.get(GPU_PREFILL, "null")) == asked
    assert (made.value("kt.gpu_prefill_tokens") == "off") == (asked is None)
    assert ("--chunked-prefill-size 8192" in " ".join(made.argv)) == (asked is not None)
    needs = made.value("fit")["GPU 0"]
    assert (needs[COMING] > 0) == (asked is not None)
    assert needs[COMING] <= (asked or {}).get("bytes", 0) if typed.get("gpu_prefill_gib") else True


def test_a_number_of_tokens_that_no_step_has_is_refused(gpu_machine: Host, checkpoint: Path) -> None:
    model = {"path": str(checkpoint)}
    told = r"8193, but a step takes at most 8192 tokens \(server.chunked_prefill_size\)\. Set .* to 8192 or less, or"
    with pytest.raises(LaunchErrors, match=told):
        planned(config(model=model, kt={"gpu_prefill_tokens": 8193}), gpu_machine)
    sizes = {"chunked_prefill_size": 8193}
    made = planned(config(model=model, server=sizes, kt={"gpu_prefill_tokens": 8193}), gpu_machine)
    assert made.value("kt.gpu_prefill_tokens") == 8193


def test_what_has_not_run_on_a_card_is_tried_where_it_is_asked_for(two_gpus: Host, checkpoint: Path) -> None:
    model = {"path": str(checkpoint)}
    made = planned(config(model=model, server={"dp": 2}), two_gpus)
    assert (
        made.resolved["kt.gpu_prefill_tokens"].source
        == "derived: server.dp has not run on a card this way; auto tries it"
    )
    assert GPU_PREFILL not in made.env
    asked = planned(config(model=model, server={"dp": 2}, kt={"gpu_prefill_tokens": "auto"}), two_gpus)
    split = planned(config(model=model, server={"tp": 2}), two_gpus)
    for made in (asked, split):
        assert made.value("kt.gpu_prefill_tokens") == "auto" and GPU_PREFILL in made.env


SPARED = " for the processes of server.tp and NCCL"


@pytest.mark.parametrize(
    ("server", "kt", "threads", "why"),
    [
        ({}, {}, 32, "affinity to 32 CPUs"),
        ({"tp": 2}, {}, 15, f"affinity to 16 CPUs, less 1{SPARED}, for each of 2 processes"),
        ({"tp": 2}, {"tp_experts": "rank0"}, 28, f"affinity to 32 CPUs, less 4{SPARED}"),
        ({"dp": 2}, {}, 16, "affinity to 16 CPUs, for each of 2 processes"),
        ({"tp": 2, "device": "cpu"}, {"tp_experts": "rank0"}, 32, "affinity to 32 CPUs"),
    ],
    ids=str,
)  # fmt: skip
def test_processes_that_wait_for_each_other_have_free_cores(
    server: dict[str, Any], kt: dict[str, Any], threads: int, why: str, two_gpus: Host, checkpoint: Path
) -> None:
    made = planned(config(model={"path": str(checkpoint)}, server=server, kt=kt), on_cores(32, two_gpus))
    assert made.value("kt.cpuinfer") == threads
    assert made.resolved["kt.cpuinfer"].source == f"probed: {32 if threads > 16 else 16} usable physical cores, {why}"
    assert not any("kt.cpuinfer" in warning for warning in made.warnings)


def test_threads_on_cores_that_should_be_free_are_warned_about(two_gpus: Host, checkpoint: Path) -> None:
    words: dict[str, Any] = {"model": {"path": str(checkpoint)}, "server": {"tp": 2}}
    typed = {"tp_experts": "rank0", "cpuinfer": 30}
    made = planned(config(**words, kt=typed), on_cores(32, two_gpus))
    told = "kt.cpuinfer: 30 threads leave 2 of 32 physical cores to the processes of server.tp and NCCL; 28 is usually"
    assert any(warning.startswith(told) for warning in made.warnings)
    few = planned(config(**words, kt={"tp_experts": "rank0"}), on_cores(4, two_gpus))
    assert few.value("kt.cpuinfer") == 2


def test_no_experts_come_to_gpus_of_which_one_would_bring_all(two_gpus: Host, checkpoint: Path) -> None:
    settings: dict[str, Any] = {"model": {"path": str(checkpoint)}, "server": {"tp": 2}}
    made = planned(config(**settings, kt={"tp_experts": "rank0"}), two_gpus)
    found = made.resolved["kt.gpu_prefill_tokens"]
    assert (found.value, found.source.partition(": ")[0]) == ("off", "derived") and GPU_PREFILL not in made.env
    with pytest.raises(
        LaunchErrors, match=r"700, but with kt\.tp_experts=rank0 only the first GPU has experts to bring"
    ):
        planned(config(**settings, kt={"tp_experts": "rank0", "gpu_prefill_tokens": 700}), two_gpus)


def test_a_machine_without_a_gpu_has_nowhere_to_bring_experts_to(machine: Host, checkpoint: Path) -> None:
    made = planned(config(model={"path": str(checkpoint)}, kt={"gpu_prefill_tokens": 700}), machine)
    assert made.resolved["kt.gpu_prefill_tokens"].source == "derived: there is no GPU to bring experts to"
    assert GPU_PREFILL not in made.env and "--chunked-prefill-size" not in made.argv
    assert not any("prefill" in warning for warning in made.warnings)


def test_the_size_of_a_step_can_be_typed(gpu_machine: Host, checkpoint: Path) -> None:
    model = {"path": str(checkpoint)}
    made = planned(config(model=model, server={"chunked_prefill_size": 32768}), gpu_machine)
    assert "--chunked-prefill-size 32768" in " ".join(made.argv)
    small = replace(gpu_machine, gpus=(Gpu(0, "NVIDIA Test", 24 << 30, 24 << 30),))
    assert "--chunked-prefill-size" not in planned(config(model=model), small).argv


def on_card(gib: float, tmp_path: Path, family: str, sizes: dict[str, Any], /, tp: int = 1, **kt: Any) -> LaunchPlan:
    """The plan of a checkpoint with other sizes than those on disk, on cards with so much free memory each."""
    path = tmp_path / family
    base = replace(read_checkpoint(path if path.exists() else write_checkpoint(path, family)), **sizes)
    roomy = read_host(Machine(cores=8, memory_bytes=1 << 40).write(tmp_path / f"machine-{tp}-{gib}"))
    gpus = tuple(Gpu(number, "NVIDIA Test", 24 << 30, int(gib * (1 << 30))) for number in range(tp))
    made = config(model={"path": str(path)}, kt=kt, server={"context_length": 512, "tp": tp})
    problems, machine = Problems(), replace(roomy, gpus=gpus, cuda_torch=True)
    facts = replace(read_facts(made, Sources(), problems, machine), port=Port(30000, True), checkpoint=base)
    return resolve(made, facts, Sources(), problems)


LARGE: tuple[str, dict[str, Any]] = ("mixtral", {"hidden_size": 4096, "moe_intermediate_size": 14336})
MANY: tuple[str, dict[str, Any]] = (
    "deepseek_v2",
    {"hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 64},
)


def test_buffers_that_do_not_fit_are_left_out_and_told(tmp_path: Path) -> None:
    """With experts as large as Mixtral's, on a card that holds the rest of the model and little more."""
    assert on_card(24, tmp_path, *LARGE, gpu_prefill_tokens="auto").value("kt.gpu_prefill_tokens") == "auto"
    made = on_card(6, tmp_path, *LARGE, gpu_prefill_tokens="auto")
    assert made.value("kt.gpu_prefill_tokens") == "off" and made.value("kt.gpu_prefill_gib") is None
    assert [warning for warning in made.warnings if "prefill" in warning] == [
        "kt.gpu_prefill_tokens: off, because the 0.98 GiB of buffers, the smallest, do not fit on the GPU; long "
        "prompts are computed at the speed of the CPU"
    ]
    with pytest.raises(LaunchErrors, match=r"kt\.gpu_prefill_tokens=off"):
        on_card(6, tmp_path, *LARGE, gpu_prefill_tokens=700)


@pytest.mark.parametrize(("gib", "tp"), [(2.4, 1), (3.25, 2), (3.2, 2)])
@pytest.mark.parametrize("tokens", ["auto", 700])
def test_buffers_are_as_large_as_fits(gib: float, tp: int, tokens: int | str, tmp_path: Path) -> None:
    """With 64 experts as large as DeepSeek-V2-Lite's, on cards that hold the rest of the model and less than the
    usual buffers."""
    made = on_card(gib, tmp_path, *MANY, tp=tp, gpu_prefill_tokens=tokens)
    size, source = made.resolved["kt.gpu_prefill_gib"].value, made.resolved["kt.gpu_prefill_gib"].source
    assert made.value("kt.gpu_prefill_tokens") == tokens
    assert not any("prefill" in warning for warning in made.warnings)
    count, experts = re.fullmatch(  # type: ignore[union-attr]
        r"derived: the most that fits beside the rest: (\d) pieces of (\d+) experts?, and one unpacked", source
    ).groups()
    assert json.loads(made.env[GPU_PREFILL])["bytes"] == int(size * (1 << 30))
    assert 0 <= int(size * (1 << 30)) - made.value("fit")["GPU 0"][COMING] < (1 << 30) / 100
    # one more expert in each piece would not have fitted
    more = size * (int(experts) + 1) / int(experts) + 0.01
    typed = on_card(gib, tmp_path, *MANY, tp=tp, gpu_prefill_tokens="auto", gpu_prefill_gib=more)
    assert int(count) >= 2 and typed.value("kt.gpu_prefill_tokens") == "off"
    assert typed.value("kt.gpu_prefill_gib") == more
    # and those that were chosen can be typed
    typed = on_card(gib, tmp_path, *MANY, tp=tp, gpu_prefill_tokens="auto", gpu_prefill_gib=size)
    assert typed.value("fit") == made.value("fit") and typed.value("kt.gpu_prefill_tokens") == "auto"


def test_a_size_without_room_for_two_experts_is_refused_with_one_that_has(tmp_path: Path) -> None:
    with pytest.raises(LaunchErrors, match=r"kt\.gpu_prefill_gib: 0\.01, but two experts .* take more") as caught:
        on_card(24, tmp_path, *MANY, gpu_prefill_gib=0.01)
    (size,) = re.findall(r"Set kt\.gpu_prefill_gib=(\d\.\d+)\.", str(caught.value))
    made = on_card(24, tmp_path, *MANY, gpu_prefill_gib=float(size))
    assert 0 < made.value("fit")["GPU 0"][COMING] <= float(size) * (1 << 30)
    with pytest.raises(LaunchErrors, match="two experts"):
        on_card(24, tmp_path, *MANY, gpu_prefill_gib=float(size) - 0.01)


def test_a_gpu_takes_as_many_experts_as_fit(gpu_machine: Host, checkpoint: Path, tmp_path: Path) -> None:
    """The tiny model has 4 experts a layer, of which one stays on the CPU."""
    model = {"path": str(checkpoint)}
    for kt, count, source in (
        ({}, 0, "derived: all routed experts on the CPU; auto takes as many as fit on the GPU"),
        ({"num_gpu_experts": "auto"}, 3, "derived: what fits beside a KV cache of that size, in steps of 1"),
        ({"num_gpu_experts": 2}, 2, "default"),
        ({"num_gpu_experts": 0}, 0, "default"),
        ({"record_experts": "counts"}, 0, "derived: kt.record_experts counts experts that run on the CPU"),
    ):
        made = planned(config(model=model, kt=kt), gpu_machine)
        assert made.value("kt.num_gpu_experts") == count and made.resolved["kt.num_gpu_experts"].source == source
        assert made.argv[made.argv.index("--kt-num-gpu-experts") + 1] == str(count)
        assert made.value("server.cuda_graph") == "decode"
    small = replace(gpu_machine, gpus=(Gpu(0, "NVIDIA Test", 1 << 36, 1 << 20),))
    made = planned(config(model=model, kt={"num_gpu_experts": "auto"}, server={"fit": "warn"}), small)
    assert made.value("kt.num_gpu_experts") == 0
    assert made.resolved["kt.num_gpu_experts"].source == "derived: none fit on the GPU"


def test_the_files_of_a_profile_reach_the_server(machine: Host, checkpoint: Path, tmp_path: Path) -> None:
    layers = {layer: [1, 2, 3, 4] for layer in read_checkpoint(checkpoint).moe_layers}
    path = tmp_path / "profile.json"
    write_profile(path, layers)
    kt = {"num_gpu_experts": 2, "expert_profile": str(path)}
    made = planned(config(model={"path": str(checkpoint)}, kt=kt), machine)
    assert made.env[EXPERT_PROFILE] == str(path)
    assert any("computed by plain torch, which is slow" in warning for warning in made.warnings)
    recording = planned(config(model={"path": str(checkpoint)}, kt={"record_experts": str(path)}), machine)
    assert recording.env[RECORD_EXPERTS] == str(path)
    with pytest.raises(LaunchErrors, match=r"2, but kt\.record_experts counts experts that run on the CPU"):
        planned(config(model={"path": str(checkpoint)}, kt={**kt, "record_experts": str(path)}), machine)
    write_profile(path, {99: [1, 2, 3, 4]})
    with pytest.raises(LaunchErrors, match="has no counts of layer"):
        planned(config(model={"path": str(checkpoint)}, kt=kt), machine)


@pytest.mark.parametrize(
    ("server", "source", "warned"),
    [
        ({"cuda_graph": "off"}, "typed: server.cuda_graph", False),
        (
            {"attention_backend": "torch_native"},
            "server.attention_backend=torch_native is not known to run inside a CUDA graph",
            True,
        ),
        ({"lora_backend": "csgmv"}, "server.lora_backend=csgmv is not known to run inside a CUDA graph", True),
    ],
)
def test_a_gpu_goes_without_graphs_where_it_must(
    server: dict[str, str], source: str, warned: bool, gpu_machine: Host, checkpoint: Path, adapter: Path
) -> None:
    made = planned(config(model={"path": str(checkpoint)}, lora={"path": str(adapter)}, server=server), gpu_machine)
    assert made.resolved["server.cuda_graph"].value == "off"
    assert "--disable-decode-cuda-graph --disable-prefill-cuda-graph" in " ".join(made.argv)
    assert (f"server.cuda_graph: off, because {source}" in made.warnings) == warned
    if warned:
        assert made.resolved["server.cuda_graph"].source == f"derived: {source}"


def test_a_gpu_that_torch_cannot_use_is_left(gpu_machine: Host, checkpoint: Path) -> None:
    made = planned(config(model={"path": str(checkpoint)}), replace(gpu_machine, cuda_torch=False))
    assert made.value("server.device") == "cpu"
    assert made.resolved["server.device"].source == "probed: NVIDIA Test, but the installed torch is a CPU build"


def test_a_gpu_that_is_not_there_is_refused(machine: Host, checkpoint: Path) -> None:
    with pytest.raises(LaunchErrors, match=r"server\.device: cuda, but no GPU\. Set server\.device=cpu\."):
        planned(config(model={"path": str(checkpoint)}, server={"device": "cuda"}), machine)


def test_backends_are_the_users_when_given(machine: Host, checkpoint: Path) -> None:
    server = {"device": "cpu", "attention_backend": "intel_amx"}
    made = planned(config(model={"path": str(checkpoint)}, server=server), machine)
    assert "--attention-backend intel_amx" in " ".join(made.argv)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_from_its_own_names(family: str, machine: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", family)
    made = planned(config(model={"path": str(path)}), machine)
    assert made.value("model.family") == family
    assert made.value("model.moe_layers") == (2 if FAMILIES[family].first_dense_key else 3)


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
DEPARTURES: tuple[tuple[str, dict[str, Any], str], ...] = (
    (
        "deepseek_v2",
        {"attention_bias": True},
        "attention_bias is true in config.json, but SGLang's deepseek_v2 computes",
    ),
    (
        "deepseek_v3",
        {"attention_bias": True},
        "attention_bias is true in config.json, but SGLang's deepseek_v3 computes",
    ),
    ("deepseek_v2", {"mlp_bias": True}, "computes dense layers and shared experts without biases"),
    (
        "qwen3_moe",
        {"decoder_sparse_step": 3},
        "2 of 3 layers are dense in config.json, but SGLang's qwen3_moe has experts",
    ),
    (
        "qwen2_moe",
        {"mlp_only_layers": [1]},
        "1 of 3 layers are dense in config.json, but SGLang's qwen2_moe has experts",
    ),
    (
        "mixtral",
        {"num_attention_heads": 4, "head_dim": 16},
        "head_dim is 16 in config.json, but SGLang's mixtral divides",
    ),
    (
        "qwen3_moe",
        {"architectures": ["Qwen3MoeForSequenceClassification"]},
        "it is a Qwen3MoeForSequenceClassification, which writes no text; expected is one ForCausalLM",
    ),
    ("deepseek_v2", {"n_group": 2}, "n_group is 2 and topk_method greedy in config.json, but SGLang's deepseek_v2"),
    (
        "qwen3_moe",
        {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        "dual_chunk_attention_config is set in config.json, but SGLang's qwen3_moe has no attention for it",
    ),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but a layer has 4 experts"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act is gelu in config.json, but SGLang's mixtral computes SiLU"),
    (
        "qwen3_moe",
        {"rope_scaling": YARN | {"attention_factor": 1.0}},
        "rope_scaling.attention_factor is 1.0 in config.json, but SGLang's qwen3_moe derives it",
    ),
    (
        "deepseek_v3",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.1386}},
        "rope_scaling.attention_factor is 1.1386 in config.json, but SGLang's deepseek_v3 derives it",
    ),
    ("deepseek_v2", {"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate is false in config.json, but"),
    (
        "glm4_moe",
        {"rope_scaling": YARN | {"attn_factor": 2, "extrapolation_factor": 0.5}},
        "rope_scaling.attn_factor is 2 and rope_scaling.extrapolation_factor is 0.5 in config.json, but SGLang's",
    ),
    ("qwen2_moe", {"rope_scaling": YARN | {"attention_factor": "x"}}, "rope_scaling.attention_factor is x in config"),
)
SAME: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen3_moe", {"attention_bias": True, "head_dim": 16, "num_attention_heads": 4}),
    ("qwen3_moe", {"dual_chunk_attention_config": None}),
    ("deepseek_v2", {"n_group": 2, "topk_method": "group_limited_greedy"}),
    ("glm4_moe", {"attention_bias": True, "first_k_dense_replace": 2}),
    ("deepseek_v2", {"attention_bias": False, "first_k_dense_replace": 2}),
    ("mixtral", {"num_attention_heads": 4, "head_dim": 8}),
    ("mixtral", {"hidden_act": "silu"}),
    ("qwen3_moe", {"rope_scaling": YARN | {"attention_factor": 1.13863, "truncate": False}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}}),
    ("glm4_moe", {"rope_scaling": YARN | {"attn_factor": 1, "attention_factor": None}}),
)


@pytest.mark.parametrize(("family", "changes", "message"), DEPARTURES)
def test_a_model_that_sglang_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], message: str, machine: Host, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", family, **changes)
    with pytest.raises(LaunchErrors, match=rf"model\.path: .*{re.escape(message)}"):
        planned(config(model={"path": str(path)}), machine)


@pytest.mark.parametrize(("family", "changes"), SAME)
def test_what_it_computes_as_the_model_was_trained_is_served(
    family: str, changes: dict[str, Any], machine: Host, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", family, **changes)
    assert planned(config(model={"path": str(path)}), machine).value("model.family") == family


def test_a_longer_context_that_yarn_reaches_is_told_how(machine: Host, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", rope_scaling=YARN, max_position_embeddings=160)
    within = r"Set server\.context_length=160, or write \"max_position_embeddings\": 512 into config\.json"
    with pytest.raises(LaunchErrors, match=within):
        planned(config(model={"path": str(path)}, server={"context_length": 512}), machine)
    with pytest.raises(LaunchErrors, match=r"513 tokens, .* for 160. Set server\.context_length=160; with SGLANG_"):
        planned(config(model={"path": str(path)}, server={"context_length": 513}), machine)


NEEDED: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("deepseek_v2", {"n_group": None}, "n_group", 'Add "n_group": 1 to it'),
    (
        "deepseek_v3",
        {"topk_method": None, "moe_layer_freq": None},
        "moe_layer_freq, topk_method",
        'Add "moe_layer_freq": 1, "topk_method": "noaux_tc" to it',
    ),
)


@pytest.mark.parametrize(("family", "changes", "names", "fix"), NEEDED)
def test_keys_that_sglang_has_no_default_for_are_needed(
    family: str, changes: dict[str, Any], names: str, fix: str, machine: Host, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", family, **changes)
    said = rf"model\.path: .*json has no {names}, which SGLang's {family} asks for. {fix}"
    with pytest.raises(LaunchErrors, match=said):
        planned(config(model={"path": str(path)}), machine)


WINDOWS: tuple[tuple[str, dict[str, Any], int | None], ...] = (
    ("mixtral", {"sliding_window": 100}, 100),
    ("mixtral", {"sliding_window": None}, None),
    ("qwen3_moe", {"sliding_window": 100, "use_sliding_window": True}, 100),
    ("qwen2_moe", {"sliding_window": 1000, "use_sliding_window": True}, 512),
    ("qwen2_moe", {"sliding_window": 100, "use_sliding_window": False}, None),
)


@pytest.mark.parametrize(("family", "changes", "window"), WINDOWS)
def test_contexts_end_where_attention_stops_looking_back(
    family: str, changes: dict[str, Any], window: int | None, machine: Host, gpu_machine: Host, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", family, **changes)
    model = {"path": str(path)}
    assert planned(config(model=model), machine).value("server.context_length") == (window or 512)
    assert planned(config(model=model), gpu_machine).value("server.context_length") == window
    if window == 100:
        with pytest.raises(LaunchErrors, match=r"server\.context_length: 101 tokens, but its attention covers 100"):
            planned(config(model=model, server={"context_length": 101}), machine)


ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "yarn": {"type": "yarn", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_scaling_that_sglang_computes_otherwise_is_refused(
    family: str, device: str, gpu_machine: Host, tmp_path: Path
) -> None:
    """That SGLang does was seen by comparing logprobs with transformers; the others are served."""
    served = {"default", "yarn", "linear"}
    served -= {"linear"} if FAMILIES[family].latent_cache else {"yarn", "linear"} if family == "mixtral" else set()
    for rope, scaling in ROPES.items():
        path = write_checkpoint(tmp_path / rope, family, rope_scaling=scaling)
        wanted = config(model={"path": str(path)}, server={"device": device})
        if rope in served:
            assert planned(wanted, gpu_machine).value("server.device") == device
            continue
        with pytest.raises(LaunchErrors, match=rf"model\.path: its rope_scaling is of type {rope}, .* {family} was"):
            planned(wanted, gpu_machine)


def test_the_sources_tell_command_line_environment_preset_and_default(
    plan: Launch, launch: Launch, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = plan("kt.cpuinfer=1")
    assert typed.source("kt.cpuinfer") == "command line: kt.cpuinfer=1"
    assert typed.source("model.path") == f"command line: model.path={checkpoint}"
    assert typed.source("server.host") == "default"
    assert typed.source("server.port") == "probed: a free port"
    assert typed.source("kt.num_gpu_experts") == "derived: all routed experts on the CPU"
    preset = plan("server=cpu", "server.host=127.0.0.2")
    assert preset.source("server.device") == "command line: server.device=cpu"
    monkeypatch.setenv("KT_LAUNCH_MODELS", str(checkpoint.parent))
    rooted = launch("action=plan", "format=json", "model=auto", f"model.folder={checkpoint.name}", "server=cpu")
    assert rooted.value("model.path") == str(checkpoint)
    assert rooted.source("model.path").startswith(f"environment: KT_LAUNCH_MODELS={checkpoint.parent}; command line")
    assert rooted.source("server.device") == "preset file: conf/server/cpu.yaml"


def test_the_adapters_root_is_the_models_root_unless_it_is_given(
    plan: Launch, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "root" / "Kllama2_deepseekV2_WEST_ALL")
    monkeypatch.setenv("KT_LAUNCH_MODELS", str(tmp_path / "root"))
    assert "KT_LAUNCH_MODELS" in plan("lora=west_all").source("lora.west_all.path")
    monkeypatch.setenv("KT_LAUNCH_LORAS", str(tmp_path / "elsewhere"))
    failed = plan("lora=west_all")
    assert failed.code == 2
    assert f"no folder {tmp_path / 'elsewhere'}" in failed.err


def test_lora_path_replaces_the_path_of_the_only_adapter(
    launch: Launch, plan: Launch, adapter: Path, tmp_path: Path, checkpoint: Path
) -> None:
    other = write_adapter(tmp_path / "other")
    own = ("action=plan", "format=json", f"model.path={checkpoint}", "server.device=cpu")
    replaced = launch(*own, "lora=demo_west", f"lora.path={other}")
    assert replaced.value("lora.west.path") == str(other)
    assert launch(*own, f"lora.path={other}").value("lora.other.path") == str(other)
    both = plan("lora.adapters.west.path=" + str(adapter), f"lora.path={other}", "lora.name=mine")
    assert (both.value("lora.west.path"), both.value("lora.mine.path")) == (str(adapter), str(other))


def test_context_is_bounded_by_the_model(plan: Launch) -> None:
    made = plan()
    assert made.value("server.context_length") == 512
    assert made.value("server.max_total_tokens") == 512 * made.value("server.max_running_requests")


@pytest.mark.parametrize(
    ("latent", "rotary", "backend", "served"),
    [
        (512, 64, "triton", True),
        (256, 32, "triton", True),
        (64, 32, "triton", False),
        (512, 64, "flashinfer", True),
        (256, 32, "flashmla", False),
        (64, 32, "fa3", True),
    ],
)
def test_a_backend_is_refused_where_its_latent_attention_would_not_run(
    latent: int, rotary: int, backend: str, served: bool, gpu_machine: Host, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": latent, "qk_rope_head_dim": rotary}
    path = write_checkpoint(tmp_path / "model", "deepseek_v2", **sizes)
    asked = config(model={"path": str(path)}, server={"attention_backend": backend})
    if served:
        assert planned(asked, gpu_machine).value("server.attention_backend") == backend
        return
    expected = (
        rf"server\.attention_backend: {backend}, but the model's latent attention is {latent} \+ 32 wide, expected"
    )
    with pytest.raises(LaunchErrors, match=expected):
        planned(asked, gpu_machine)


@pytest.mark.parametrize(("latent", "rotary", "chosen"), [(512, 64, None), (256, 32, "triton"), (64, 32, None)])
def test_latent_attention_that_one_backend_alone_serves_gets_that(
    latent: int, rotary: int, chosen: str | None, gpu_machine: Host, machine: Host, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": latent, "qk_rope_head_dim": rotary}
    asked = config(model={"path": str(write_checkpoint(tmp_path / "model", "deepseek_v2", **sizes))})
    assert planned(asked, gpu_machine).value("server.attention_backend") == chosen
    assert planned(asked, machine).value("server.attention_backend") == "torch_native"
