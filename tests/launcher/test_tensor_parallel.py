"""Several scheduler processes: models that they cannot split are refused before anything starts, and each of them has
cores, memory and flags in the plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from tiny_files import write_checkpoint

from kt_launch.cluster import replicas
from kt_launch.cluster.replicas import write_parts
from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import prepare
from kt_launch.machine.allocation import first_of
from kt_launch.machine.host import Rights, read_host
from kt_launch.running import child_launcher
from kt_launch.runs.replay_safety import trusted
from kt_model.errors import Problems
from kt_model.plan import LaunchPlan, Resolved

Launch = Callable[..., Any]
FLAGS = {
    "--tp-size,2": "Set server.tp=2 instead.",
    "--tensor-parallel-size=2": "Set server.tp=2 instead.",
    "--tp,2": "Set server.tp=2 instead.",
    "--dp-size=3": "Set server.dp=3 instead.",
    "--nnodes": "Set server.nodes=<value> instead.",
    "--node-rank,1": "Set server.node_rank=1 instead.",
    "--dist-init-addr=a:1": "Set server.rendezvous=a:1 instead.",
}


@pytest.fixture
def planned(launch: Launch, tmp_path: Path) -> Launch:
    """Plans a model of 6 heads, expert width 16, with these words."""

    def call(*words: str, **changes: Any) -> Any:
        path = write_checkpoint(tmp_path / "model", num_attention_heads=6, **changes)
        return launch("action=plan", "server.device=cpu", "model=auto", f"model.path={path}", *words)

    return call


@pytest.fixture
def on_two_nodes(tmp_path: Path) -> Callable[..., LaunchPlan]:
    """Plans the model with these keys of server.*, and kt.tp_experts, for two NUMA nodes with four cores each."""
    model = write_checkpoint(tmp_path / "model", num_attention_heads=6)
    tree = Machine(nodes=2, cores=4).write(tmp_path / "machine")

    def call(**server: Any) -> LaunchPlan:
        kt = {"tp_experts": server.pop("tp_experts", "auto")}
        config, mistakes = validate({"model": {"path": str(model)}, "server": {"device": "cpu", **server}, "kt": kt})
        assert mistakes == []
        return prepare(config, Sources(), Problems(), lambda: read_host(tree, Rights(True, True)))

    return call


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_split_evenly_are_taken(planned: Launch, count: int) -> None:
    assert planned(f"server.tp={count}").code == 0


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["server.tp=4"], "4 processes cannot split what config.json has: num_attention_heads 6", "Set server.tp=2."),
        (
            ["server.tp=3"],
            "3 processes cannot split what config.json has: moe_intermediate_size 16",
            "Set server.tp=2.",
        ),
        (
            ["server.tp=5"],
            "config.json has: num_attention_heads 6, moe_intermediate_size 16",
            "Set server.tp=2.",
        ),
        (
            ["server.tp=3", "server.extra_args=[--enable-dp-attention]"],
            "config.json has: moe_intermediate_size 16.",
            "Set server.tp=2.",
        ),
        (
            ["server.tp=2", "kt.method=int4", "kt.prepare=true"],
            "2 processes cannot split experts of inner width 16 in groups of 32 (int4)",
            "Set kt.method=int8, kt.tp_experts=rank0 or another server.tp.",
        ),
    ],
)
def test_processes_that_do_not_are_refused_with_fewer(
    planned: Launch, words: list[str], message: str, fix: str
) -> None:
    ended = planned(*words)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.rstrip().endswith(fix)


def test_a_width_that_only_one_process_can_have(planned: Launch) -> None:
    ended = planned("server.tp=2", intermediate_size=25)
    assert "server.tp: 2 processes cannot split what config.json has: intermediate_size 25. Leave" in ended.err


@pytest.mark.parametrize("extra", FLAGS)
def test_flags_that_keys_are_for_are_answered_with_the_keys(planned: Launch, extra: str) -> None:
    ended = planned(f"server.extra_args=[{extra}]")
    assert ended.code == 2
    assert ended.err.rstrip().endswith(FLAGS[extra])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["server.nodes=2", "server.tp=2"], "server.rendezvous: not given, but 2 hosts need an address to meet at"),
        (["server.nodes=2", "server.tp=2", "server.rendezvous=here"], "server.rendezvous: here, but 2 hosts need"),
        (["server.nodes=2", "server.rendezvous=a:1"], "server.tp: 1 processes cannot be shared out evenly to 2 hosts"),
        (["server.node_rank=1"], "server.node_rank: 1, but there is one host"),
        (["server.nodes=2", "server.tp=2", "server.rendezvous=a:1"], "server.node_rank: not given, but hosts are"),
        (["server.nodes=2", "server.tp=2", "server.node_rank=2"], "server.node_rank: 2, but hosts are numbered from 0"),
        (
            ["server.nodes=2", "server.tp=2", "server.dp=2", "server.rendezvous=a:1"],
            "server.dp: 2 copies of the model, but SGLang puts them on one host",
        ),
    ],
)
def test_hosts_that_do_not_fit_together_are_refused(planned: Launch, words: list[str], message: str) -> None:
    ended = planned(*words)
    assert ended.code == 2
    assert message in ended.err


def test_each_process_gets_a_node_its_threads_and_its_memory(on_two_nodes: Callable[..., LaunchPlan]) -> None:
    one, two = on_two_nodes(), on_two_nodes(tp=2)
    assert [found.value("kt.cpuinfer") for found in (one, two)] == [8, 4]
    assert [found.value("kt.threadpool_count") for found in (one, two)] == [2, 1]
    assert two.value("server.processes") == ["0-3", "4-7"]
    assert two.env["KT_LAUNCH_PROCESS_CPUS"] == two.env["SGLANG_CPU_OMP_THREADS_BIND"] == "0-3|4-7"
    assert two.argv[two.argv.index("--tp-size") + 1] == "2"
    experts = [two.value("fit")[f"NUMA node {number}"]["routed experts"] for number in (0, 1)]
    assert experts[0] == experts[1] > 0


def test_the_first_process_of_a_copy_has_the_cores_and_experts_of_all(on_two_nodes: Callable[..., LaunchPlan]) -> None:
    one, split, first = on_two_nodes(), on_two_nodes(tp=2), on_two_nodes(tp=2, tp_experts="rank0")
    assert (first.value("kt.cpuinfer"), first.value("kt.threadpool_count")) == (8, 2)
    assert first.value("server.processes") == ["0-7", "4-7"]
    assert (split.value("kt.tp_experts"), first.value("kt.tp_experts")) == ("split", "rank0")
    assert first.env["KT_LAUNCH_TP_EXPERTS"] == "rank0" and "KT_LAUNCH_TP_EXPERTS" not in split.env
    for place in ("host memory", "NUMA node 1"):  # which has the one slice of 16
        assert first.value("fit")[place]["routed experts"] == one.value("fit")[place]["routed experts"] > 0


def test_each_copy_has_a_first_process(on_two_nodes: Callable[..., LaunchPlan]) -> None:
    plan = on_two_nodes(tp=2, dp=2, tp_experts="rank0")
    assert plan.value("server.processes") == ["0-3", "2-3", "4-7", "6-7"]
    assert (plan.value("kt.cpuinfer"), plan.value("kt.threadpool_count")) == (4, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["server.nodes=2", "server.node_rank=0", "server.rendezvous=a:1"],
            "kt.tp_experts: rank0, but the processes of 2 hosts have no cores in common",
        ),
        (["server.extra_args=[--enable-dp-attention]"], "kt.tp_experts: rank0, but with --enable-dp-attention each"),
    ],
)
def test_where_the_first_process_cannot_compute_for_all(planned: Launch, words: list[str], message: str) -> None:
    ended = planned("server.tp=2", "kt.tp_experts=rank0", *words)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.rstrip().endswith("Set kt.tp_experts=split, or leave it out.")


def test_whole_experts_need_no_width_that_can_be_split(planned: Launch) -> None:
    ended = planned("server.tp=2", "kt.method=int4", "kt.prepare=true", "kt.tp_experts=rank0")
    assert ended.code == 0, ended.err


def test_copies_take_as_much_again_and_other_hosts_nothing(on_two_nodes: Callable[..., LaunchPlan]) -> None:
    one, copies, half = (
        on_two_nodes(**server).value("fit")["host memory"]
        for server in ({}, {"dp": 2}, {"tp": 2, "nodes": 2, "node_rank": 0, "rendezvous": "a:1"})
    )
    for part in ("rest of the model", "KV cache"):
        assert copies[part] == 2 * one[part] > 0
    assert half["rest of the model"] == one["rest of the model"] // 2


@pytest.mark.parametrize(
    ("environ", "meeting"),
    [
        ({"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu7"}, "gpu7:29500"),
        ({"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "v3-0.v3.default"}, "v3-0.v3.default:29500"),
    ],
)
def test_a_batch_system_tells_which_host_it_is(
    on_two_nodes: Callable[..., LaunchPlan], environ: dict[str, str], meeting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    plan = on_two_nodes(tp=2, nodes=2)
    assert (plan.value("server.node_rank"), plan.value("server.rendezvous")) == (1, meeting)
    assert plan.resolved["server.node_rank"].source == f"environment: {next(iter(environ))}"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[01-04,07],cpu7", "gpu01"), ("a,b", "a"), ("n[9]-ib", "n9-ib"), ("login-2", "login-2"), ("", None)],
)
def test_the_first_of_slurms_hosts_is_spelled_out(nodes: str, first: str | None) -> None:
    assert first_of(nodes) == first


@pytest.mark.parametrize("rank", [0, 1])
def test_each_host_is_told_which_it_is(on_two_nodes: Callable[..., LaunchPlan], rank: int) -> None:
    plan = on_two_nodes(tp=2, nodes=2, node_rank=rank, rendezvous="a:1")
    told = {flag: plan.argv[plan.argv.index(flag) + 1] for flag in ("--nnodes", "--node-rank", "--dist-init-addr")}
    assert told == {"--nnodes": "2", "--node-rank": str(rank), "--dist-init-addr": "a:1"}
    assert plan.value("server.processes") == ["0-7"]


def test_replicas_share_cores_ports_and_gpus_out(on_two_nodes: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    plan = on_two_nodes(replicas=2, tp=2, port=30123, metrics_port=0)
    assert plan.value("kt.cpuinfer") == 2
    plan = replace(plan, resolved={**plan.resolved, "server.devices": Resolved([4, 5, 6, 7], "")})
    parts = [part for part, _ in write_parts(plan, tmp_path)]
    assert [part.value("server.processes") for part in parts] == [["0-1", "2-3"], ["4-5", "6-7"]]
    assert [part.env["KT_LAUNCH_PROCESS_CPUS"] for part in parts] == ["0-1|2-3", "4-5|6-7"]
    assert [part.env["CUDA_VISIBLE_DEVICES"] for part in parts] == ["4,5", "6,7"]
    ports = {part.argv[part.argv.index("--port") + 1] for part in parts}
    assert len(ports) == 2 and "30123" not in ports
    for number, part in enumerate(parts):
        assert part.config["server"]["replicas"] == 1 and part.config["server"]["restarts"] > 0
        assert "server.replicas" not in part.resolved
        assert LaunchPlan.read(tmp_path / f"replica-{number}" / "plan.json").argv == part.argv


def test_one_of_several_replicas_has_the_page(on_two_nodes: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    parts = write_parts(on_two_nodes(replicas=2, playground_port=30999), tmp_path)
    assert [part.config["server"]["playground_port"] for part, _ in parts] == [30999, None]


def test_replicas_that_are_not_to_be_started_again_are_not(
    on_two_nodes: Callable[..., LaunchPlan], tmp_path: Path
) -> None:
    parts = write_parts(on_two_nodes(replicas=2, restarts=0), tmp_path)
    assert [part.config["server"]["restarts"] for part, _ in parts] == [0, 0]


def test_a_launcher_of_a_caller_in_python_starts_all_replicas(
    on_two_nodes: Callable[..., LaunchPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[LaunchPlan, Path]] = []

    def serve(plan: LaunchPlan, folder: Path, *, detached: bool, until_proven: bool) -> int:
        assert not detached and not until_proven
        started.append((plan, folder))
        return 0

    monkeypatch.setattr(replicas, "serve_replicas", serve)
    plan = on_two_nodes(replicas=2).placed_in(tmp_path)
    plan.write(tmp_path / "plan.json")
    assert child_launcher.main(tmp_path, os.getppid()) == 0
    assert started == [(plan, tmp_path)]


@pytest.mark.parametrize(
    "server",
    [
        {"tp": 2},
        {"tp": 2, "tp_experts": "rank0"},
        {"dp": 2, "replicas": 2},
        {"tp": 2, "nodes": 2, "node_rank": 0, "rendezvous": "10.255.0.1:29500"},
    ],
)
def test_a_recorded_plan_of_several_processes_is_one_of_ours(
    on_two_nodes: Callable[..., LaunchPlan], server: dict[str, Any]
) -> None:
    plan = on_two_nodes(**server)
    assert trusted(plan).env == plan.env != {}


def test_replicas_without_a_router_are_told_what_to_install(planned: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"sglang_router": None}
    monkeypatch.setattr("kt_launch.gathering.facts.find_spec", lambda name: known.get(name, find_spec(name)))
    ended = planned("server.replicas=2")
    assert ended.code == 2
    assert "server.replicas: several servers need SGLang's router, the package sglang-router" in ended.err
    assert "pip install sglang-router==" in ended.err


def test_servers_for_a_router_are_named_and_alike(launch: Launch) -> None:
    assert "workers: no servers given" in launch("action=route").err
    ended = launch("route", "workers=[http://127.0.0.1:9]")
    assert ended.code == 2
    assert "workers: no server answers at http://127.0.0.1:9" in ended.err


def test_a_router_that_other_machines_reach_needs_a_key(launch: Launch) -> None:
    ended = launch("route", "workers=[http://127.0.0.1:9]", "server.host=0.0.0.0")
    assert ended.code == 2
    assert "server.host: 0.0.0.0 is open to other machines, and no key is required" in ended.err


def test_one_server_has_no_port_for_adapters_of_several(planned: Launch) -> None:
    assert "server.adapters_port: one server loads adapters on its own port" in planned("server.adapters_port=0").err


def test_one_process_on_one_host_is_told_nothing_of_others(on_two_nodes: Callable[..., LaunchPlan]) -> None:
    plan = on_two_nodes()
    assert not {"server.tp", "server.processes", "server.node_rank"} & {*plan.resolved}
    assert not {"--tp-size", "--nnodes", "--node-rank"} & {*plan.argv}
    assert "KT_LAUNCH_PROCESS_CPUS" not in plan.env
