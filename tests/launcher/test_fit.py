"""What fit.py says a launch takes: against the kernels' own count, by hand, and on machines too small for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import GIB, Machine

from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import Gpu, Host, read_host
from kt_launch.machine.ports import Port
from kt_launch.planning.memory_fit import (
    KV,
    SHARE,
    Demand,
    estimate,
    kv_bytes,
    most_residents,
    packed_adapter_bytes,
    shard_bytes,
    slot_bytes,
)
from kt_launch.planning.nearest_fits import nearest_fits
from kt_launch.planning.resolve import resolve
from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.errors import LaunchErrors, Problems
from kt_model.families import FAMILIES, kv_values
from kt_model.methods import METHODS
from kt_model.plan import HOST_MEMORY, LaunchPlan

Launch = Callable[..., Any]
V2_LITE: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 1408, "num_experts": 64, "num_layers": 27, "top_k": 6,
    "moe_layers": tuple(range(1, 27)), "kv_values": 576, "vocab_size": 102400, "max_position": 163840,
}  # fmt: skip
FIELDS = {
    "kt.method": "method",
    "server.max_total_tokens": "max_total_tokens",
    "server.mem_fraction": "mem_fraction",
    "lora.max_per_batch": "max_per_batch",
}
"""What of a Demand a key of the config sets."""


@pytest.fixture(scope="session")
def tiny(checkpoint: Path) -> Checkpoint:
    return read_checkpoint(checkpoint)


@pytest.fixture
def large(tiny: Checkpoint) -> Checkpoint:
    """DeepSeek-V2-Lite's shapes, with 2 GiB besides the experts."""
    made = replace(tiny, **V2_LITE, expert_dtype="BF16")
    vars(made).update(other_bytes=2 * GIB, latent_projection_bytes=0)
    return made


def demand(**changes: Any) -> Demand:
    usual: dict[str, Any] = {
        "method": "bf16", "pools": 1, "device": "cpu", "context_length": 4096, "max_running_requests": 4,
        "max_total_tokens": 16384, "mem_fraction": 0.95, "max_rank": 0, "max_per_batch": 0, "total_is_derived": True,
    }  # fmt: skip
    return Demand(**(usual | changes))


def host_of(folder: Path, available_gib: float, **changes: Any) -> Host:
    """A machine with as much memory available."""
    return read_host(Machine(memory_bytes=int(2 * available_gib * GIB), **changes).write(folder))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("hidden", "inner", "pools"), [(128, 128, 1), (96, 80, 1), (100, 200, 3), (256, 64, 2)])
def test_packed_experts_are_what_the_kernels_allocate(
    method: str, hidden: int, inner: int, pools: int, tiny: Checkpoint
) -> None:
    kernels = pytest.importorskip("kt_kernels")
    pool = kernels.ThreadPool(pools, nodes=pools)
    moe = kernels.MoE(
        num_experts=5, hidden_size=hidden, intermediate_size=inner, method=METHODS[method].sglang_name, pool=pool
    )
    base = replace(tiny, num_experts=5, hidden_size=hidden, moe_intermediate_size=inner, moe_layers=(1,))
    assert sum(shard_bytes(method, base, pools)) == moe.packed_bytes


@pytest.mark.parametrize("rank", [1, 7, 16])
def test_packed_adapters_are_what_the_kernels_allocate(rank: int, tiny: Checkpoint) -> None:
    kernels = pytest.importorskip("kt_kernels")
    torch = pytest.importorskip("torch")
    e, h, i = 3, 96, 80
    shapes = {"gate_a": (e, rank, h), "gate_b": (e, i, rank), "up_a": (e, rank, h), "up_b": (e, i, rank),
              "down_a": (e, rank, i), "down_b": (e, h, rank)}  # fmt: skip
    adapter = kernels.Adapter(**{name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    base = replace(tiny, num_experts=e, hidden_size=h, moe_intermediate_size=i, moe_layers=(1,))
    as_loaded = 3 * rank * (h + i) * e * 2
    wanted = demand(expert_ranks=(rank,), max_rank=rank, max_per_batch=2)
    assert packed_adapter_bytes(wanted, base) - as_loaded == adapter.packed_bytes


def test_a_rank_beyond_all_memory_does_not_fit(large: Checkpoint, tmp_path: Path) -> None:
    absurd = demand(expert_ranks=(10**20,), max_rank=10**20, max_per_batch=2)
    assert estimate(absurd, large, host_of(tmp_path, 1000)).short


def test_methods_are_the_kernels() -> None:
    kernels = pytest.importorskip("kt_kernels")
    assert kernels.methods() == {
        method.sglang_name: {
            "format": method.name, "bits": method.bits, "scale_bytes": method.scale_bytes, "group": method.group,
        }
        for method in METHODS.values()
    }  # fmt: skip


def test_the_methods_of_a_known_model(large: Checkpoint) -> None:
    bf16, int8, int4 = (sum(shard_bytes(method, large, 1)) / GIB for method in METHODS)
    assert bf16 == pytest.approx(26 * 64 * 3 * 2048 * 1408 * 2 / GIB, rel=0.001)
    assert int8 == pytest.approx(bf16 * (1 + 4 / 2048) / 2, rel=0.002)
    assert int4 == pytest.approx(bf16 * (0.5 + 2 / 32) / 2, rel=0.004)


def test_pools_share_the_experts(large: Checkpoint) -> None:
    shards = shard_bytes("bf16", large, 2)
    assert sum(shards) == pytest.approx(sum(shard_bytes("bf16", large, 1)), rel=0.001)
    assert shards[0] == pytest.approx(shards[1], rel=0.1)


def test_the_pools_of_sglang_have_room_for_the_largest_rank_in_every_layer(large: Checkpoint) -> None:
    one = 27 * 64 * 3 * 8 * (2048 + 1408) * 2
    assert slot_bytes(demand(expert_ranks=(8,), max_rank=8, max_per_batch=3), large) == 3 * one
    assert slot_bytes(demand(), large) == 0


KV_OF = {
    "deepseek_v2": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16}, 576),
    "deepseek_v3": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 576),
    "glm4_moe": ({"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128}, 2048),
    "mixtral": ({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}, 2048),
    "qwen2_moe": ({"hidden_size": 2048, "num_attention_heads": 16}, 4096),
    "qwen3_moe": ({"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, 1024),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_of_every_family(family: str) -> None:
    config, values = KV_OF[family]
    assert kv_values(FAMILIES[family], config) == values


def test_kv_cache_of_a_known_model(large: Checkpoint) -> None:
    assert kv_bytes(demand(), large) == 16384 * 27 * 576 * 2 + 5 * 4096 * 4


def test_a_launch_that_fits_says_where_everything_lies(large: Checkpoint, tmp_path: Path) -> None:
    fit = estimate(demand(), large, host_of(tmp_path, 48))
    assert fit.short == fit.slow == ()
    assert set(fit.needs) == {HOST_MEMORY, SHARE}
    assert fit.needs[HOST_MEMORY]["routed experts"] == sum(shard_bytes("bf16", large, 1))
    assert fit.free[HOST_MEMORY] == 48 * GIB


def test_a_machine_that_does_not_tell_its_memory_is_not_judged(large: Checkpoint, tmp_path: Path) -> None:
    machine = host_of(tmp_path, 48)
    assert estimate(demand(), large, replace(machine, available_bytes=0)).budgets == ()


CHANGES: dict[str, tuple[int, dict[str, Any], str]] = {
    "room for a smaller format": (24, {}, "kt.method=int8"),
    "room for the smallest only": (14, {}, "kt.method=int4"),
    "a cache that is a little too large": (
        40, {"max_total_tokens": 400_000, "total_is_derived": False}, "server.max_total_tokens=269312",
    ),
    "a context that is too long": (
        40, {"context_length": 163_840, "max_running_requests": 8, "max_total_tokens": 8 * 163_840},
        "server.max_running_requests=1",
    ),
    "too many slots for adapters": (
        48, {"max_rank": 64, "max_per_batch": 8, "expert_ranks": (64,)}, "lora.max_per_batch=5",
    ),
    "a share that is too small": (35, {"mem_fraction": 0.5}, "server.mem_fraction=0.9"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_the_nearest_setting_that_fits_is_named_and_does_fit(case: str, large: Checkpoint, tmp_path: Path) -> None:
    available_gib, changes, expected = CHANGES[case]
    machine, wanted = host_of(tmp_path, available_gib), demand(**changes)
    assert estimate(wanted, large, machine).short
    found = nearest_fits(wanted, large, machine)
    assert expected in found
    for setting in found:
        key, _, text = setting.partition("=")
        if key in FIELDS:
            value: Any = text if key == "kt.method" else float(text) if key == "server.mem_fraction" else int(text)
            assert not estimate(replace(wanted, **{FIELDS[key]: value}), large, machine).short, setting


def test_the_suggested_cache_is_the_largest_that_fits(large: Checkpoint, tmp_path: Path) -> None:
    machine, wanted = host_of(tmp_path, 40), demand(max_total_tokens=400_000, total_is_derived=False)
    tokens = int(nearest_fits(wanted, large, machine)[0].removeprefix("server.max_total_tokens="))
    assert not estimate(replace(wanted, max_total_tokens=tokens), large, machine).short
    assert estimate(replace(wanted, max_total_tokens=tokens + 512), large, machine).short


def test_two_changes_where_no_single_one_is_enough(large: Checkpoint, tmp_path: Path) -> None:
    wanted = demand(context_length=163_840, max_total_tokens=4 * 163_840)
    found = nearest_fits(wanted, large, host_of(tmp_path, 19.5))
    assert len(found) == 1
    assert found[0].startswith(("kt.method=int8 server.", "kt.method=int4 server."))


def test_nothing_fits_on_a_machine_of_one_gigabyte(large: Checkpoint, tmp_path: Path) -> None:
    assert nearest_fits(demand(), large, host_of(tmp_path, 1)) == []


def test_each_node_gets_its_pools_share(large: Checkpoint, tmp_path: Path) -> None:
    machine = host_of(tmp_path, 48, nodes=8, cores=2)
    fit = estimate(demand(pools=8), large, machine)
    nodes = {name: parts for name, parts in fit.needs.items() if name.startswith("NUMA")}
    assert len(nodes) == 8
    assert sum(sum(parts.values()) for parts in nodes.values()) == sum(shard_bytes("bf16", large, 8))


def test_a_node_that_is_too_small_makes_it_slow_and_not_impossible(large: Checkpoint, tmp_path: Path) -> None:
    machine = host_of(tmp_path, 48, nodes=2)
    full = replace(machine.nodes[1], free_bytes=GIB)
    fit = estimate(demand(pools=2), large, replace(machine, nodes=(machine.nodes[0], full)))
    assert [budget.name for budget in fit.slow] == ["NUMA node 1"]
    assert not [budget for budget in fit.short if budget.name != SHARE]


def test_without_the_right_to_place_memory_nodes_are_not_counted(large: Checkpoint, tmp_path: Path) -> None:
    machine = replace(host_of(tmp_path, 48, nodes=2), places_memory=False)
    assert set(estimate(demand(pools=2), large, machine).needs) == {HOST_MEMORY, SHARE}


def test_sglang_counts_the_cache_once_a_node(large: Checkpoint, tmp_path: Path) -> None:
    one, two = (estimate(demand(), large, host_of(tmp_path / str(nodes), 48, nodes=nodes)) for nodes in (1, 2))
    assert two.needs[SHARE][KV] == 2 * one.needs[SHARE][KV]
    assert two.needs[HOST_MEMORY][KV] == one.needs[HOST_MEMORY][KV]


def test_a_gpu_holds_the_rest_and_the_host_the_experts(large: Checkpoint, tmp_path: Path) -> None:
    machine = replace(host_of(tmp_path, 48), gpus=(Gpu(0, "NVIDIA Test", 24 * GIB, 23 * GIB),))
    fit = estimate(demand(device="cuda", mem_fraction=None), large, machine)
    assert fit.short == ()
    assert fit.needs["GPU 0"]["rest of the model"] == 2 * GIB
    assert fit.needs[HOST_MEMORY]["rest of the model"] == fit.needs[HOST_MEMORY][KV] == 0
    busy = replace(machine, gpus=(Gpu(0, "NVIDIA Test", 24 * GIB, 2 * GIB),))
    assert "GPU 0" in [budget.name for budget in estimate(demand(device="cuda", mem_fraction=None), large, busy).short]


def test_resident_experts_move_from_the_host_to_the_gpu_and_leave_the_cache_its_half(
    large: Checkpoint, tmp_path: Path
) -> None:
    """V2-Lite: 64 experts of 17.3 MB in 26 layers; a rank-8 adapter of 83 kB on each."""
    one = 3 * 2048 * 1408 * 2 * 26
    usual = demand(device="cuda", mem_fraction=None, max_total_tokens=None)
    for gpu_gib, expected in ((80, 56), (24, 16), (14, 8), (12, 0)):
        machine = replace(host_of(tmp_path, 48), gpus=(Gpu(0, "NVIDIA Test", gpu_gib * GIB, gpu_gib * GIB),))
        count = most_residents(usual, large, machine, 8)
        assert count == expected, gpu_gib
        fit = estimate(replace(usual, resident=count), large, machine)
        none = estimate(usual, large, machine)
        assert fit.short == ()
        assert none.needs[HOST_MEMORY]["routed experts"] - fit.needs[HOST_MEMORY]["routed experts"] == count * one
        assert fit.needs["GPU 0"].get("routed experts", 0) == count * one <= fit.needs["GPU 0"][KV]
    adapted = replace(usual, resident=8, max_rank=8, max_per_batch=2, expert_ranks=(8,))
    slots = estimate(adapted, large, machine).needs["GPU 0"]["adapters"]
    assert slots == 2 * 8 * 3 * 8 * (2048 + 1408) * 26 * 2


def test_too_many_resident_experts_are_told_with_how_many_fit(large: Checkpoint, tmp_path: Path) -> None:
    machine = replace(host_of(tmp_path, 48), gpus=(Gpu(0, "NVIDIA Test", 24 * GIB, 24 * GIB),))
    wanted = demand(device="cuda", mem_fraction=None, max_total_tokens=None, total_is_derived=False, resident=60)
    assert "GPU 0" in [place.name for place in estimate(wanted, large, machine).short]
    setting = nearest_fits(wanted, large, machine)[0]
    assert setting.startswith("kt.num_gpu_experts=")
    fewer = replace(wanted, resident=int(setting.partition("=")[2]))
    assert estimate(fewer, large, machine).short == ()
    assert estimate(replace(fewer, resident=fewer.resident + 1), large, machine).short


# From a config to what a user sees


def planned(host: Host, model: Path, adapter: Path | None = None, **server: Any) -> LaunchPlan:
    lora = {"path": str(adapter)} if adapter else {}
    made, mistakes = validate({"model": {"path": str(model)}, "lora": lora, "server": {"device": "cpu"} | server})
    assert mistakes == []
    problems = Problems()
    facts = read_facts(made, Sources(), problems, host)
    return resolve(made, replace(facts, port=Port(30000, True)), Sources(), problems)


def test_a_plan_carries_the_breakdown(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    made = planned(host_of(tmp_path, 8), checkpoint, adapter)
    assert set(made.value("fit")) == set(made.value("fit.free")) == {HOST_MEMORY, SHARE}
    assert made.value("fit")[HOST_MEMORY]["adapters"] > 0
    assert made.resolved["server.mem_fraction"].source == "derived: for device cpu"


def test_a_launch_that_does_not_fit_is_refused_with_what_takes_what(checkpoint: Path, tmp_path: Path) -> None:
    cgroup = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": f"{GIB // 2}\n"}
    host = host_of(tmp_path, 8, cgroup="0::/\n", files=cgroup)
    with pytest.raises(LaunchErrors) as caught:
        planned(host, checkpoint)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert line.startswith("server.fit: host memory: 1.")
    assert "SGLang itself 1.45" in line
    assert "0.50 GiB are free. No setting fits: " in line


def test_server_fit_warn_starts_it_all_the_same(checkpoint: Path, tmp_path: Path) -> None:
    cgroup = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": "0\n"}
    made = planned(host_of(tmp_path, 8, cgroup="0::/\n", files=cgroup), checkpoint, fit="warn")
    assert [warning for warning in made.warnings if warning.startswith("server.fit: host memory: ")]


def test_a_typed_cache_that_is_too_large_is_answered_with_one_that_fits(checkpoint: Path, tmp_path: Path) -> None:
    machine = host_of(tmp_path, 2)
    with pytest.raises(LaunchErrors, match=r"Set server\.max_total_tokens=\d+") as caught:
        planned(machine, checkpoint, max_total_tokens=1 << 24)
    tokens = int(str(caught.value).partition("server.max_total_tokens=")[2].split(",")[0].split(".")[0])
    assert planned(machine, checkpoint, max_total_tokens=tokens).value("server.max_total_tokens") == tokens


def test_sglangs_share_grows_where_nobody_typed_it(checkpoint: Path, tmp_path: Path) -> None:
    machine = host_of(tmp_path, 2)
    usual = planned(machine, checkpoint)
    cell = usual.value("fit")[SHARE][KV] / usual.value("server.max_total_tokens")
    tokens = int(0.84 * usual.value("fit.free")[SHARE] / 0.8 / cell)
    made = planned(machine, checkpoint, max_total_tokens=tokens)
    assert made.value("server.mem_fraction") == 0.9
    assert made.resolved["server.mem_fraction"].source == "derived: 0.8 leaves too little"
    assert "--mem-fraction-static 0.9" in " ".join(made.argv)


def test_the_table_shows_the_breakdown(launch: Launch, checkpoint: Path) -> None:
    shown = launch("action=plan", "model=auto", "server.device=cpu", f"model.path={checkpoint}").out
    header = next(line for line in shown.splitlines() if line.startswith("fit (GiB)"))
    assert header.split()[-2:] == ["free", "now"]
    assert "routed experts" in header
