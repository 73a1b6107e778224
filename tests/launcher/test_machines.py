"""One plan on machines of every kind, read from fixture trees: threads, pools, kernels, free memory, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from machines import AMX, AVX2, GIB, Machine

from kt_launch.commandline.terminal import print_table, show_value
from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import Rights, read_host
from kt_launch.machine.ports import Port
from kt_launch.planning.resolve import resolve
from kt_model.errors import Problems
from kt_model.plan import LaunchPlan

ALL = Rights(amx=True, memory_placement=True)
CONTAINER = {
    "sys/fs/cgroup/box/cpu.max": "600000 100000\n",
    "sys/fs/cgroup/box/memory.max": f"{12 * GIB}\n",
    "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {1 * GIB}\n",
}


@dataclass(frozen=True)
class Kind:
    """A machine, and what a plan on it says."""

    machine: Machine
    threads: int
    pools: Sequence[str]
    kernels: str = "avx512"
    free_gib: int = 32
    rights: Rights = ALL
    warned: Sequence[str] = ()


NARROW = "kt.threadpool_count: {} pools, but experts of inner width 16 are cut into 1 parts"
KINDS = {
    "a single socket": Kind(Machine(cores=8), 8, ["threads 8, cpus 0-7"]),
    "a single socket with SMT": Kind(Machine(cores=8, threads=2), 8, ["threads 8, cpus 0-15"]),
    "two nodes with SMT": Kind(
        Machine(nodes=2, cores=8, threads=2), 16,
        ["node 0, threads 8, cpus 0-7,16-23", "node 1, threads 8, cpus 8-15,24-31"], warned=[NARROW.format(2)],
    ),
    "eight nodes": Kind(
        Machine(nodes=8, cores=4), 32,
        [f"node {node}, threads 4, cpus {4 * node}-{4 * node + 3}" for node in range(8)], warned=[NARROW.format(8)],
    ),
    "more cores of one node than of the other": Kind(
        Machine(nodes=2, cores=8, affinity="0-9"), 10, ["node 0, threads 5, cpus 0-7", "node 1, threads 5, cpus 8-9"],
        warned=[NARROW.format(2), "kt.cpuinfer: 2 pools of 5 threads, but one of the NUMA nodes has 2 usable cores, "
                "and the others wait for it. Set kt.cpuinfer=4, or let it use as many cores of each node"],
    ),
    "a container limited in CPU and memory": Kind(
        Machine(cores=16, cgroup="0::/box\n", files=CONTAINER), 6, ["threads 6, cpus 0-15"], free_gib=10
    ),
    "Docker without the right to place memory": Kind(
        Machine(nodes=2, cores=2), 4, ["node 0, threads 2, cpus 0-1", "node 1, threads 2, cpus 2-3"],
        rights=Rights(amx=True, memory_placement=False),
        warned=[NARROW.format(2), "kt.threadpool_count: this container may not place memory"],
    ),
    "no AVX-512": Kind(Machine(flags=AVX2), 4, ["threads 4, cpus 0-3"], kernels="avx2"),
    "AMX": Kind(Machine(flags=AMX), 4, ["threads 4, cpus 0-3"], kernels="amx"),
    "AMX without permission": Kind(
        Machine(flags=AMX), 4, ["threads 4, cpus 0-3"], rights=Rights(amx=False, memory_placement=True),
        warned=["kt.method: the CPU has AMX, but the kernel refuses it; avx512 is used"],
    ),
    "neither": Kind(
        Machine(flags="fpu sse2"), 4, ["threads 4, cpus 0-3"], kernels="reference",
        warned=["kt.method: this CPU has neither AVX2 nor more"],
    ),
}  # fmt: skip


def planned(kind: Kind, checkpoint: Path, folder: Path) -> LaunchPlan:
    made, mistakes = validate({"model": {"path": str(checkpoint)}, "server": {"device": "cpu"}})
    assert mistakes == []
    problems = Problems()
    facts = read_facts(made, Sources(), problems, read_host(kind.machine.write(folder), kind.rights))
    return resolve(made, replace(facts, port=Port(30000, True), disk=None), Sources(), problems)


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_on(name: str, checkpoint: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    plan = planned(kind, checkpoint, tmp_path)
    assert plan.value("kt.cpuinfer") == kind.threads
    assert plan.value("kt.threadpool_count") == len(kind.pools)
    assert show_value(plan.value("kt.pools")).split("; ") == list(kind.pools)
    assert plan.value("kt.instruction_set") == kind.kernels
    assert plan.value("fit.free")["host memory"] == kind.free_gib * GIB
    assert [warning.startswith(message) for warning, message in zip(plan.warnings, kind.warned, strict=True)] == [
        True for _ in kind.warned
    ]


def test_a_table_folds_its_wide_columns_and_keeps_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(["word"] * 60)
    print_table(("key", "value", "source"), [("a.very.long.key.that.stays.whole", long, "x" * 200), ("b", "1", "")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 160
    assert lines[1].startswith("a.very.long.key.that.stays.whole  word word")
    assert sum(line.count("word") for line in lines) == 60
    assert sum(line.count("x") for line in lines) == 200
    assert lines[-1] == "b" + " " * 33 + "1"
