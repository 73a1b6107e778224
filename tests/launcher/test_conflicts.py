"""Values of a plan that do not go together, or not well: every row of CONFLICTS, by a situation in which it holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kt_launch.config.schema import Config, Kt, Server, read_fields
from kt_launch.machine.limits import Limits
from kt_launch.planning.conflicts import (
    CONFLICTS,
    FIXES,
    REFUSED_FLAGS,
    REFUSED_LORA_FLAGS,
    Conflict,
    Situation,
    conflicts,
)
from kt_launch.planning.ranks import STAGES, ranks_of
from kt_model.flags import is_flag, requested

Launch = Callable[..., Any]
SOUND = Situation(
    method="bf16", threads=32, pools=2, nodes=2, fewest_cores=16, hidden=2048, intermediate=1408, experts_bytes=1 << 34,
    padding_percent=0.0, device="cpu", attention_backend="torch_native", lora_backend="torch_native",
    instruction_set="avx512", amx_refused=False, places_memory=True, disk="NVMe", adapters=1, lora=True,
    expert_lora=True, max_per_batch=2, cores=32, processes=1, computing=1, stages=1, http_workers=1,
    flags=frozenset(), limits=Limits(), max_running_requests=48,
)  # fmt: skip


def flag(name: str) -> dict[str, Any]:
    return {"flags": frozenset((name,))}


CASES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"pools": 32, "intermediate": 768}, "inner width 768 are cut into 12 parts at most"),
    ({"pools": 4}, "4 pools share 2 NUMA nodes"),
    ({"pools": 1}, "1 pools on 2 NUMA nodes"),
    ({"places_memory": False}, "may not place memory on NUMA nodes"),
    ({"threads": 31}, "31 threads do not divide evenly among 2 pools"),
    ({"fewest_cores": 4}, "2 pools of 16 threads, but one of the NUMA nodes has 4 usable cores"),
    ({"padding_percent": 33.3, "hidden": 2049}, "33 % of the packed experts is padding (hidden 2049 and inner width"),
    ({"amx_refused": True}, "the CPU has AMX, but the kernel refuses it; avx512 is used"),
    ({"instruction_set": "reference"}, "neither AVX2 nor more"),
    ({"attention_backend": "flashinfer"}, "flashinfer needs a GPU, but server.device is cpu"),
    ({"lora_backend": "triton"}, "triton needs a GPU, but server.device is cpu"),
    ({"disk": "network"}, "is on a network disk"),
    ({"adapters": 3}, "2 of 3 adapters and the base model fit in one batch"),
    ({**flag("--lora-paths"), "adapters": 0, "expert_lora": False}, "neither checked nor proven"),
    (flag("--experts-shared-outer-loras"), "in a way that CPU experts do not read"),
    (flag("--lora-use-virtual-experts"), "for experts on a GPU"),
    (flag("--speculative-algorithm"), "drafts with the bare model"),
    (flag("--kt-max-deferred-experts-per-token"), "changes what is computed"),
    (flag("--quantization"), "that of CPU experts is kt.method"),
    (flag("--ep-size"), "--ep-size spreads experts over GPUs"),
    (flag("--expert-parallel-size"), "--expert-parallel-size spreads"),
    (flag("--ep"), "--ep spreads"),
    ({"limits": Limits(open_files=99), "max_running_requests": 64}, "99 files open, and the server needs 100"),
    ({"limits": Limits(open_files=87)}, "a process may have 87 files open, and the server needs 88"),
    ({"limits": Limits(open_files=129), "processes": 2}, "129 files open, and the server needs 130"),
    ({"limits": Limits(threads_left=87)}, "87 more processes and threads may be started, and the server needs 88"),
    ({"limits": Limits(address_space_bytes=17 << 30)}, "17.0 GiB of addresses (ulimit -v, ulimit -d), and the server"),
    ({"processes": 2, "computing": 2}, "2 scheduler processes start 32 expert threads each, on 32 cores"),
    ({"stages": 2}, "processes, of which only the first can be proven"),
    ({"http_workers": 2}, "with --tokenizer-worker-num 2 processes answer requests"),
    (flag("--moe-a2a-backend"), "--moe-a2a-backend spreads"),
    (flag("--enable-eplb"), "--enable-eplb spreads"),
    (flag("--enable-two-batch-overlap"), "CPU experts handle the adapters of one batch"),
    (flag("--elastic-ep-backend"), "--elastic-ep-backend spreads"),
    (flag("--enable-paged-experts"), "how many stay there is kt.num_gpu_experts"),
    (flag("--is-embedding"), "this one writes text"),
    (flag("--config"), "which the plan does not see"),
    (flag("--enable-custom-logit-processor"), "runs Python that requests bring along"),
    (flag("--uno-lora-path"), "neither checked nor proven"),
    (flag("--grpc-port"), "--grpc-port answers over gRPC"),
    (flag("--grpc-mode"), "--grpc-mode answers over gRPC"),
    (flag("--smg-grpc-mode"), "--smg-grpc-mode answers over gRPC"),
    (flag("--ssl-certfile"), "--ssl-certfile encrypts the port"),
    (flag("--ssl-keyfile"), "--ssl-keyfile encrypts the port"),
    (flag("--json-model-override-args"), "but not what the plan, the experts' kernels and the proof read"),
    (flag("--json-model-override"), "changes what SGLang reads of config.json"),
    (flag("--decrypted-config-file"), "has SGLang read another config.json"),
    (flag("--revision"), "but the server reads a folder"),
    (flag("--delete-ckpt-after-loading"), "which a restart and the proof read"),
    (flag("--use-ray"), "which are then not watched"),
    (flag("--quantiz"), "that of CPU experts is kt.method"),
    (flag("--speculative-algo"), "drafts with the bare model"),
)


def test_a_sound_plan_meets_none() -> None:
    assert list(conflicts(SOUND)) == []
    assert list(conflicts(replace(SOUND, adapters=0, lora=False, expert_lora=False, max_per_batch=0))) == []


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[message for _, message in CASES])
def test_each_conflict_is_told_alone(changes: dict[str, Any], message: str) -> None:
    found = list(conflicts(replace(SOUND, **changes)))
    assert [message in problem for _, problem, _ in found] == [True]


def test_what_to_do_instead_of_a_refused_flag_is_told() -> None:
    fixes = {name: fix for name in FIXES for _, _, fix in conflicts(replace(SOUND, **flag(name)))}
    assert fixes == FIXES


def test_every_row_has_a_case_and_names_a_key() -> None:
    met: list[Conflict] = [conflict for changes, _ in CASES for conflict, _, _ in conflicts(replace(SOUND, **changes))]
    assert [conflict.problem for conflict in CONFLICTS if conflict not in met] == []
    assert {conflict.key for conflict in CONFLICTS} <= {key for key, _ in read_fields()}
    assert [conflict.problem for conflict in CONFLICTS if conflict.refused and not conflict.fix] == []


def test_what_concerns_adapters_only_is_silent_without_them() -> None:
    bare = replace(SOUND, adapters=0, lora=False, expert_lora=False, max_per_batch=0)
    for name in ("--experts-shared-outer-loras", "--lora-use-virtual-experts", "--speculative-algorithm"):
        assert list(conflicts(replace(bare, **flag(name)))) == []


def test_little_padding_in_a_small_model_is_not_worth_a_word() -> None:
    assert list(conflicts(replace(SOUND, padding_percent=80.0, experts_bytes=1 << 20))) == []


@pytest.mark.parametrize(
    ("keys", "tp_experts", "count", "computing"),
    [
        ({}, "auto", 1, 1),
        ({}, "rank0", 1, 1),
        ({"tp": 2}, "auto", 2, 2),
        ({"tp": 2}, "split", 2, 2),
        ({"tp": 2}, "rank0", 2, 1),
        ({"tp": 2, "dp": 3}, "auto", 6, 6),
        ({"tp": 2, "dp": 3}, "rank0", 6, 3),
        ({"tp": 2, "replicas": 2}, "rank0", 4, 2),
        ({"tp": 4, "dp": 2, "extra_args": ["--enable-dp-attention"]}, "auto", 4, 4),
        ({"tp": 4, "nodes": 2}, "auto", 2, 2),
    ],
)
def test_scheduler_processes_of_a_host_are_counted_as_sglang_starts_them(
    keys: dict[str, Any], tp_experts: Any, count: int, computing: int
) -> None:
    ranks = ranks_of(Config(server=Server(**keys), kt=Kt(tp_experts=tp_experts)))
    assert (ranks.here, ranks.computing) == (count, computing)


@pytest.mark.parametrize(
    ("words", "count"),
    {
        "": 1,
        "--pp-size 2": 2,
        "--pp 2": 2,
        "--pipeline-parallel-size=2": 2,
        "--pp-size 2 --pp-size 1": 1,
        "--pp-size two": 1,
        "--pp-size": 1,
    }.items(),
)
def test_flags_are_read_as_sglang_reads_them(words: str, count: int) -> None:
    assert requested(words.split(), STAGES) == count


def test_a_process_with_its_own_share_of_the_cores_is_no_conflict() -> None:
    assert list(conflicts(replace(SOUND, processes=2, computing=2, threads=16))) == []
    assert list(conflicts(replace(SOUND, processes=2, computing=1))) == []
    (found,) = conflicts(replace(SOUND, processes=4, computing=4))
    assert found[2] == "Set kt.cpuinfer=8."


def test_limits_that_are_just_wide_enough_are_none() -> None:
    limits = Limits(open_files=88, threads_left=88, address_space_bytes=18 << 30)
    assert list(conflicts(replace(SOUND, limits=limits))) == []
    assert list(conflicts(replace(SOUND, limits=Limits(address_space_bytes=6 << 30), method="int4"))) == []


def test_sglang_has_the_flags_that_are_refused_and_no_other_begins_one() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    refused = {*REFUSED_FLAGS, *REFUSED_LORA_FLAGS}
    assert refused <= known
    assert [flag for flag in known - refused if any(is_flag(flag, each) for each in refused)] == []


def test_a_plan_refuses_all_of_them_at_once(plan: Launch) -> None:
    ended = plan("server.attention_backend=fa3", "server.extra_args=[--enable-eplb,--quantization=fp8]")
    assert ended.code == 2
    assert [line.split(":")[1].strip() for line in ended.err.splitlines()] == [
        "server.attention_backend", "server.extra_args", "server.extra_args",
    ]  # fmt: skip


def test_a_plan_warns_of_what_is_only_slow(plan: Launch, adapter: Path) -> None:
    warnings = plan(f"lora.path={adapter}", "lora.max_per_batch=1").plan["warnings"]
    assert "lora.max_per_batch: 1 of 1 adapters and the base model fit in one batch, so requests take turns" in warnings
