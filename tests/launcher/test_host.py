"""What host.py reads from machines of several kinds, and the threads and pools that follow."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from machines import AMX, AVX2, AVX512, GIB, Machine

from kt_launch.machine.host import (
    Rights,
    ask_rights,
    disk_kind,
    read_disk,
    read_host,
    visible_gpus,
)
from kt_launch.planning.threads import fewest_cores, pool_places, usable_threads
from kt_model.cpulist import parse_cpu_list, show_cpu_list

V1 = "4:memory:/box\n2:cpu,cpuacct:/box\n"
V2 = "0::/box/inner\n"
KINDS = {
    "one socket": (Machine(cores=8), 8, 1),
    "SMT counts cores, not threads": (Machine(cores=8, threads=2), 8, 1),
    "two nodes": (Machine(nodes=2, cores=16, threads=2), 32, 2),
    "eight nodes": (Machine(nodes=8, cores=4), 32, 8),
    "affinity to one node of two": (Machine(nodes=2, cores=4, affinity="0-3"), 4, 1),
    "affinity to both threads of two cores": (Machine(cores=4, threads=2, affinity="0,1,4,5"), 2, 1),
    "cgroup v2 quota": (
        Machine(cores=8, cgroup=V2, files={"sys/fs/cgroup/box/inner/cpu.max": "300000 100000\n"}), 3, 1,
    ),
    "cgroup v2 quota of the group above": (
        Machine(cores=8, cgroup=V2, files={"sys/fs/cgroup/box/inner/cpu.max": "max 100000\n",
                                           "sys/fs/cgroup/box/cpu.max": "250000 100000\n"}), 2, 1,
    ),
    "cgroup v2 namespace, quota at the root": (
        Machine(cores=8, cgroup="0::/\n", files={"sys/fs/cgroup/cpu.max": "50000 100000\n"}), 1, 1,
    ),
    "cgroup v1 quota": (
        Machine(cores=8, cgroup=V1, files={"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000\n",
                                           "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}), 4, 1,
    ),
    "cgroup v1 without quota": (
        Machine(cores=8, cgroup=V1, files={"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n",
                                           "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}), 8, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_pools_follow_the_machine(kind: str, tmp_path: Path) -> None:
    machine, threads, nodes = KINDS[kind]
    host = read_host(machine.write(tmp_path))
    assert (usable_threads(host)[0], len(host.nodes_in_use)) == (threads, nodes)


def test_the_bounds_on_threads_are_named(tmp_path: Path) -> None:
    quota = {"sys/fs/cgroup/box/inner/cpu.max": "300000 100000\n"}
    host = read_host(Machine(cores=8, affinity="0-5", cgroup=V2, files=quota).write(tmp_path))
    _, source = usable_threads(host)
    assert source == "probed: 6 usable physical cores, affinity to 6 CPUs, a cgroup quota of 3 CPUs"


def test_memory_of_machine_nodes_and_cgroup(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{8 * GIB}\n"}
    host = read_host(Machine(nodes=2, cgroup=V1, files=limits).write(tmp_path))
    assert host.memory_bytes == 64 * GIB
    assert [node.memory_bytes for node in host.nodes] == [32 * GIB, 32 * GIB]
    assert host.memory_limit_bytes == 8 * GIB


def test_cgroup_v1s_way_to_say_no_memory_limit(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n"}
    assert read_host(Machine(cgroup=V1, files=limits).write(tmp_path)).memory_limit_bytes is None


MEMORY = "sys/fs/cgroup/memory/box/memory"
FREE = {
    "no limit": (Machine(), 32),
    "cgroup v2": (Machine(cgroup=V2, files={
        "sys/fs/cgroup/box/inner/memory.max": f"{8 * GIB}\n", "sys/fs/cgroup/box/inner/memory.current": f"{5 * GIB}\n",
        "sys/fs/cgroup/box/inner/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n"}), 5),
    "cgroup v2, the group above is tighter": (Machine(cgroup=V2, files={
        "sys/fs/cgroup/box/inner/memory.max": f"{8 * GIB}\n", "sys/fs/cgroup/box/inner/memory.current": f"{1 * GIB}\n",
        "sys/fs/cgroup/box/memory.max": f"{9 * GIB}\n", "sys/fs/cgroup/box/memory.current": f"{6 * GIB}\n"}), 3),
    "cgroup v1": (Machine(cgroup=V1, files={
        f"{MEMORY}.limit_in_bytes": f"{8 * GIB}\n", f"{MEMORY}.usage_in_bytes": f"{5 * GIB}\n",
        f"{MEMORY}.stat": f"total_inactive_file {1 * GIB}\n"}), 4),
    "cgroup with more than the machine has": (Machine(cgroup=V2, files={
        "sys/fs/cgroup/box/memory.max": f"{99 * GIB}\n", "sys/fs/cgroup/box/memory.current": "0\n"}), 32),
    "over its limit": (Machine(cgroup=V2, files={
        "sys/fs/cgroup/box/memory.max": f"{1 * GIB}\n", "sys/fs/cgroup/box/memory.current": f"{2 * GIB}\n"}), 0),
    "memory of one node of eight": (Machine(nodes=8, files={
        "proc/self/status": "Cpus_allowed_list:\t0-31\nMems_allowed_list:\t3\n"}), 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", FREE)
def test_what_a_new_process_may_take(kind: str, tmp_path: Path) -> None:
    machine, free_gib = FREE[kind]
    assert read_host(machine.write(tmp_path)).free_bytes == free_gib * GIB


def test_pages_of_files_count_as_free_on_a_node(tmp_path: Path) -> None:
    node = "Node 0 MemTotal: 800 kB\nNode 0 MemFree: 100 kB\nNode 0 Active(file): 20 kB\nNode 0 Inactive(file): 3 kB\n"
    host = read_host(Machine(files={"sys/devices/system/node/node0/meminfo": node}).write(tmp_path))
    assert host.nodes[0].free_bytes == 123 * 1024


def test_huge_pages(tmp_path: Path) -> None:
    never = {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"}
    assert read_host(Machine(files=never).write(tmp_path)).huge_pages == "never"


@pytest.mark.parametrize(
    ("flags", "amx", "best"),
    [
        (AMX, True, "amx"),
        (AMX, False, "avx512"),
        (AVX512, True, "avx512"),
        (AVX2, True, "avx2"),
        ("fpu sse2", True, "reference"),
    ],
)
def test_the_best_instruction_set_is_what_cpu_and_kernel_allow(
    flags: str, amx: bool, best: str, tmp_path: Path
) -> None:
    host = read_host(Machine(flags=flags).write(tmp_path), Rights(amx, memory_placement=True))
    assert host.instruction_set == best
    assert host.amx_permitted == (amx and flags == AMX)


def test_bf16_dot_products_are_for_amd(tmp_path: Path) -> None:
    host = read_host(Machine(vendor="AuthenticAMD").write(tmp_path))
    assert host.instruction_set == "avx512_bf16"


def test_this_machines_instruction_set_is_the_kernels_choice() -> None:
    kernels = pytest.importorskip("kt_kernels")
    assert read_host().instruction_set == kernels.isas()[0]


def test_a_container_without_the_right_to_place_memory(tmp_path: Path) -> None:
    host = read_host(Machine(nodes=2).write(tmp_path), Rights(amx=True, memory_placement=False))
    assert not host.places_memory
    assert ask_rights() == ask_rights()


DISKS = {
    "nvme0n1p2": ("nvme0n1", "0", "ext4", "NVMe"), "sda1": ("sda", "0", "xfs", "solid state"),
    "sdb1": ("sdb", "1", "ext4", "spinning"), "vda1": ("vda", "1", "ext4", "virtual"),
    "none": ("", "", "nfs4", "network"), "shm": ("", "", "tmpfs", "memory"), "odd": ("", "", "overlay", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("part", DISKS)
def test_speed_classes_of_disks(part: str, tmp_path: Path) -> None:
    disk, rotational, system, kind = DISKS[part]
    block = tmp_path / "sys/devices/block" / (disk or "x") / part
    block.mkdir(parents=True)
    if rotational:
        (block.parent / "queue").mkdir()
        (block.parent / "queue/rotational").write_text(f"{rotational}\n")
        (tmp_path / "sys/dev/block").mkdir(parents=True)
        (tmp_path / "sys/dev/block/8:1").symlink_to(block)
    (tmp_path / "proc/self").mkdir(parents=True)
    mounts = f"1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 8:1 / /models rw shared:1 - {system} source rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(mounts)
    assert disk_kind(Path("/models/a"), os.makedev(8, 1), tmp_path) == kind


def test_the_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert read_disk(tmp_path / "a/b").free_bytes > 0


POOLS = {
    "one pool on one node": (Machine(cores=4), 4, 1, [(None, 4, "0-3")]),
    "two nodes with SMT": (Machine(nodes=2, cores=2, threads=2), 4, 2, [(0, 2, "0-1,4-5"), (1, 2, "2-3,6-7")]),
    "threads that do not divide": (Machine(nodes=2, cores=2), 3, 2, [(0, 2, "0-1"), (1, 1, "2-3")]),
    "only CPUs of the affinity": (Machine(nodes=2, cores=4, affinity="2-5"), 4, 2, [(0, 2, "2-3"), (1, 2, "4-5")]),
    "one pool on two nodes is not bound": (Machine(nodes=2, cores=2), 4, 1, [(None, 4, "0-3")]),
}


CORES = {
    "one node": (Machine(cores=4), 4),
    "as many on each": (Machine(nodes=2, cores=4, threads=2), 4),
    "two of the second": (Machine(nodes=2, cores=8, affinity="0-9"), 2),
    "both threads of one core of the second": (Machine(nodes=2, cores=4, threads=2, affinity="0-4,8-12"), 1),
}


@pytest.mark.parametrize("kind", CORES)
def test_the_node_with_the_fewest_cores(kind: str, tmp_path: Path) -> None:
    machine, fewest = CORES[kind]
    assert fewest_cores(read_host(machine.write(tmp_path))) == fewest


@pytest.mark.parametrize("kind", POOLS)
def test_threads_and_cpus_of_each_pool(kind: str, tmp_path: Path) -> None:
    machine, threads, pools, expected = POOLS[kind]
    places = pool_places(read_host(machine.write(tmp_path)), threads, pools)
    assert [(place["node"], place["threads"], place["cpus"]) for place in places] == expected


def test_a_machine_without_topology_files_is_counted_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Cpus_allowed_list:\t0-1\n")
    host = read_host(tmp_path)
    assert 1 <= usable_threads(host)[0] <= 2
    assert len(host.nodes_in_use) == 1


def test_this_machine_agrees_with_psutil() -> None:
    host = read_host()
    assert len(host.cores) == psutil.cpu_count(logical=False)
    assert host.affinity == frozenset(os.sched_getaffinity(0))
    assert host.memory_bytes == psutil.virtual_memory().total


def test_cpu_lists() -> None:
    assert parse_cpu_list("0-2,5,7-8\n") == {0, 1, 2, 5, 7, 8}
    assert parse_cpu_list("\n") == frozenset()
    assert show_cpu_list({5, 8, 0, 1, 7, 2}) == "0-2,5,7-8"


SHARES = {
    "a node each": (Machine(nodes=2, cores=16, threads=2), 2, ["0-15,32-47", "16-31,48-63"], 1),
    "halves of nodes": (Machine(nodes=2, cores=4), 4, ["0-1", "2-3", "4-5", "6-7"], 1),
    "two nodes each": (Machine(nodes=4, cores=2), 2, ["0-3", "4-7"], 2),
    "uneven": (Machine(cores=5), 2, ["0-1", "2-4"], 1),
    "fewer cores than processes": (Machine(cores=2), 3, ["0-1", "0-1", "0-1"], 1),
}


@pytest.mark.parametrize("kind", SHARES)
def test_processes_of_one_host_share_it_out_by_nodes(kind: str, tmp_path: Path) -> None:
    machine, processes, cpus, nodes = SHARES[kind]
    shares = read_host(machine.write(tmp_path)).shares(processes)
    assert [show_cpu_list(share.affinity) for share in shares] == cpus
    assert all(len(share.nodes_in_use) == nodes for share in shares)


def test_processes_share_the_quota_too(tmp_path: Path) -> None:
    quota = {"sys/fs/cgroup/box/inner/cpu.max": "600000 100000\n"}
    host = read_host(Machine(cores=8, cgroup=V2, files=quota).write(tmp_path))
    assert [usable_threads(share)[0] for share in host.shares(2)] == [3, 3]


LISTING = "0, GPU-aaaa, NVIDIA H200, 143771, 140000\n1, GPU-bbbb, NVIDIA H200, 143771, 20\n"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("GPU-bb", [1]), ("0,7,1", [0])],
)
def test_cuda_visible_devices_chooses_gpus_as_cuda_does(visible: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(LISTING, visible)] == indices
