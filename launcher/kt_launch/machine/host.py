"""The facts of the machine: CPUs, affinity, cgroup limits, NUMA nodes, memory, disks, GPUs, ports. Nothing outside of
this room reads the machine; processes and what memory they hold are in files of their own.

Everything under /proc and /sys is read below a root that tests replace by a fixture tree. Decides nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from kt_launch.machine.kernel import cgroup_folders, find, read_text
from kt_launch.machine.limits import Limits, read_limits
from kt_model.cpulist import parse_cpu_list

UNLIMITED_BYTES = 1 << 60

# x86-64 system calls that request a permission: AMX tiles, and the placement of memory.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
GET_MEMPOLICY = 239

AVX512_FLAGS = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"))
INSTRUCTION_SETS: Mapping[str, frozenset[str]] = {
    "amx": AVX512_FLAGS | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": AVX512_FLAGS | {"avx512_bf16"},
    "avx512": AVX512_FLAGS,
    "avx2": frozenset(("avx2", "fma")),
    "reference": frozenset(),
}
"""Flags of /proc/cpuinfo that each kernel of kt_kernels asks for, best first."""

NETWORK = re.compile(r"nfs4?|cifs|smb3|ceph|lustre|glusterfs|9p|virtiofs|fuse\.(?!overlay).*|beegfs|gpfs|afs")
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node: its CPUs and its memory."""

    number: int
    cpus: frozenset[int]
    memory_bytes: int
    free_bytes: int
    """Free, or used by clean file pages."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that this process may use."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    uuid: str = ""

    @property
    def memory(self) -> str:
        """Its memory's name, in a plan's estimate and next to it in what was measured."""
        return f"GPU {self.index}"


@dataclass(frozen=True)
class Host:
    """The facts of a machine, as far as this process is allowed to use it."""

    cpu_model: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    cores: tuple[frozenset[int], ...]
    """Physical cores of the whole machine, each a set of its logical CPUs."""
    affinity: frozenset[int]
    """Logical CPUs this process may run on."""
    quota_cpus: float | None
    """CPU time the cgroup allows, in CPUs, or None."""
    nodes: tuple[NumaNode, ...]
    memory_bytes: int
    available_bytes: int
    memory_limit_bytes: int | None
    """Memory the cgroup allows, or None."""
    memory_left_bytes: int | None
    """What the tightest cgroup limit leaves, with droppable file pages counted as free; None without a limit."""
    memory_nodes: frozenset[int]
    """NUMA nodes whose memory this process may use."""
    places_memory: bool
    """Whether the kernel lets this process choose the NUMA node of its memory; Docker forbids it by default."""
    amx_permitted: bool
    """Whether the kernel granted this process AMX tiles; false on a CPU without them."""
    huge_pages: str
    """Setting of transparent huge pages: always, madvise, never, or unknown."""
    gpus: tuple[Gpu, ...]
    cuda_torch: bool
    """Whether the installed torch can use a GPU; only checked if there is one."""
    limits: Limits
    """Limits set by a shell or a container."""

    @property
    def usable_cores(self) -> int:
        """Physical cores with at least one CPU that this process may run on."""
        return sum(1 for core in self.cores if core & self.affinity)

    @property
    def nodes_in_use(self) -> tuple[NumaNode, ...]:
        """NUMA nodes with at least one CPU that this process may run on."""
        return tuple(node for node in self.nodes if node.cpus & self.affinity)

    def shares(self, count: int) -> tuple[Host, ...]:
        """This host as each of `count` processes gets it: neighbouring cores, so whole NUMA nodes if their number
        allows, and an equal part of the cgroup's CPU time. With fewer cores than processes, each gets all of them.
        Memory is not divided."""
        node_of = {cpu: node.number for node in self.nodes for cpu in node.cpus}
        usable = [core & self.affinity for core in self.cores if core & self.affinity]
        cores = sorted(usable, key=lambda core: (node_of.get(min(core), 0), min(core)))
        quota = None if self.quota_cpus is None else self.quota_cpus / count
        if count == 1 or len(cores) < count:
            return (replace(self, quota_cpus=quota),) * count
        bounds = [number * len(cores) // count for number in range(count + 1)]
        parts = [cores[first:end] for first, end in pairwise(bounds)]
        return tuple(replace(self, affinity=frozenset().union(*part), quota_cpus=quota) for part in parts)

    @property
    def free_bytes(self) -> int:
        """Memory that a new process may use; 0 if the machine does not say."""
        limits = [self.available_bytes]
        if self.memory_left_bytes is not None:
            limits.append(self.memory_left_bytes)
        if self.memory_nodes and self.memory_nodes < {node.number for node in self.nodes}:
            limits.append(sum(node.free_bytes for node in self.nodes if node.number in self.memory_nodes))
        return max(min(limits), 0) if self.available_bytes else 0

    @property
    def instruction_set(self) -> str:
        """The best one that CPU and kernel allow, as kt_kernels calls it. The bfloat16 dot product is only fast on
        AMD's CPUs."""
        usable = [name for name, flags in INSTRUCTION_SETS.items() if flags <= self.cpu_flags]
        if "avx512_bf16" in usable and self.cpu_vendor != "AuthenticAMD":
            usable.remove("avx512_bf16")
        return next(name for name in usable if name != "amx" or self.amx_permitted)


@dataclass(frozen=True)
class Disk:
    """The disk that holds a folder: its speed class, and its free bytes."""

    kind: str
    """NVMe, solid state, spinning, virtual, network, memory, or unknown."""
    free_bytes: int


@dataclass(frozen=True)
class Rights:
    """What the kernel lets this process do; no file says so, it can only be tried."""

    amx: bool
    memory_placement: bool


def read_host(root: Path = Path("/"), rights: Rights | None = None) -> Host:
    """All facts. With a root other than /, no program is run, no GPU is looked for, and rights are as given."""
    rights = rights or (ask_rights() if root == Path("/") else Rights(amx=True, memory_placement=True))
    cpuinfo = read_text(root / "proc/cpuinfo")
    affinity = _read_affinity(root)
    memory = _read_meminfo(root / "proc/meminfo")
    flags = frozenset(_cpuinfo_value(cpuinfo, "flags").split())
    limit, left = _read_memory_limit(root)
    nodes = _read_nodes(root, affinity, memory)
    gpus = read_gpus() if root == Path("/") else ()
    return Host(
        cpu_model=_cpuinfo_value(cpuinfo, "model name") or "unknown CPU",
        cpu_vendor=_cpuinfo_value(cpuinfo, "vendor_id"),
        cpu_flags=flags,
        cores=_read_cores(root, affinity),
        affinity=affinity,
        quota_cpus=_read_quota(root),
        nodes=nodes,
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", 0),
        memory_limit_bytes=limit,
        memory_left_bytes=left,
        memory_nodes=_read_memory_nodes(root) or frozenset(node.number for node in nodes),
        places_memory=rights.memory_placement,
        amx_permitted=rights.amx and "amx_tile" in flags,
        huge_pages=_read_huge_pages(root),
        gpus=gpus,
        cuda_torch=bool(gpus) and torch_has_cuda(),
        limits=read_limits(root),
    )


def ask_rights() -> Rights:
    """Requesting AMX tiles grants them to this process; requesting the memory policy changes nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    amx = libc.syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
    refused = libc.syscall(GET_MEMPOLICY, None, None, 0, None, 0) != 0 and ctypes.get_errno() == errno.EPERM
    return Rights(amx, not refused)


def _cpuinfo_value(cpuinfo: str, name: str) -> str:
    return find(rf"^{name}\s*:\s*(.*)$", cpuinfo)


def _read_affinity(root: Path) -> frozenset[int]:
    allowed = parse_cpu_list(find(r"^Cpus_allowed_list:\s*(\S+)", read_text(root / "proc/self/status")))
    online = parse_cpu_list(read_text(root / "sys/devices/system/cpu/online"))
    return (allowed & (online or allowed)) if allowed else frozenset(os.sched_getaffinity(0))


def _read_cores(root: Path, affinity: frozenset[int]) -> tuple[frozenset[int], ...]:
    """Physical cores from the topology; if sysfs has none, as psutil counts them."""
    folder = root / "sys/devices/system/cpu"
    cores = set()
    for topology in folder.glob("cpu[0-9]*/topology"):
        siblings = read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list")
        if siblings.strip():
            cores.add(parse_cpu_list(siblings))
    if cores:
        return tuple(sorted(cores, key=min))
    return _cores_by_count(sorted(affinity))


def _cores_by_count(cpus: list[int]) -> tuple[frozenset[int], ...]:
    import psutil

    count = min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
    return tuple(frozenset(cpus[first::count]) for first in range(count))


def _read_meminfo(path: Path) -> dict[str, int]:
    pairs = re.findall(r"(\w+(?:\(\w+\))?):\s+(\d+) kB", read_text(path))
    return {name: int(kilobytes) * 1024 for name, kilobytes in pairs}


def _read_nodes(root: Path, affinity: frozenset[int], memory: dict[str, int]) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        own = _read_meminfo(folder / "meminfo")
        cpus = parse_cpu_list(read_text(folder / "cpulist"))
        number = int(folder.name.removeprefix("node"))
        droppable = own.get("Active(file)", 0) + own.get("Inactive(file)", 0) + own.get("SReclaimable", 0)
        nodes.append(NumaNode(number, cpus, own.get("MemTotal", 0), own.get("MemFree", 0) + droppable))
    if not nodes:
        return (NumaNode(0, affinity, memory.get("MemTotal", 0), memory.get("MemAvailable", 0)),)
    return tuple(sorted(nodes, key=lambda node: node.number))


def _read_quota(root: Path) -> float | None:
    """The tightest CPU quota of the cgroups that this process is in."""
    quotas = []
    for folder, version_2 in cgroup_folders(root, "cpu"):
        if version_2:
            words = read_text(folder / "cpu.max").split()
        else:
            words = [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _read_memory_limit(root: Path) -> tuple[int | None, int | None]:
    """The lowest memory limit of the cgroups that this process is in, and the least memory that any of them leaves."""
    limits, left = [], []
    for folder, version_2 in cgroup_folders(root, "memory"):
        names = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (read_text(folder / name).strip() for name in names)
        if limit.isdigit() and int(limit) < UNLIMITED_BYTES:
            limits.append(int(limit))
            taken = int(used) - _droppable(folder, version_2) if used.isdigit() else 0
            left.append(int(limit) - max(taken, 0))
    return min(limits, default=None), min(left, default=None)


def _droppable(folder: Path, version_2: bool) -> int:
    """Bytes of file pages in a cgroup, which the kernel drops before it kills a process."""
    name = "inactive_file" if version_2 else "total_inactive_file"
    return int(find(rf"^{name} (\d+)$", read_text(folder / "memory.stat")) or 0)


def _read_memory_nodes(root: Path) -> frozenset[int]:
    return parse_cpu_list(find(r"^Mems_allowed_list:\s*(\S+)", read_text(root / "proc/self/status")))


def _read_huge_pages(root: Path) -> str:
    return find(r"\[(\w+)\]", read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")) or "unknown"


def read_disk(folder: Path) -> Disk:
    """The disk of a folder, or of its nearest ancestor that exists."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kind = disk_kind(there.resolve(), there.stat().st_dev)
    return Disk(kind, shutil.disk_usage(there).free)


def disk_kind(folder: Path, device: int, root: Path = Path("/")) -> str:
    """The speed class, from the file system's type and what the kernel says about the device or its disk."""
    system = _file_system(folder, root)
    if NETWORK.fullmatch(system):
        return "network"
    if system in IN_MEMORY:
        return "memory"
    block = (root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (block, block.parent):
        rotational = read_text(place / "queue/rotational").strip()
        if rotational:
            return _speed_class(place.name, rotational == "1")
    return "unknown"


def _speed_class(name: str, rotational: bool) -> str:
    """A virtual machine's disk claims to rotate whatever it is."""
    if name.startswith(("vd", "xvd")):
        return "virtual"
    return "spinning" if rotational else "NVMe" if name.startswith("nvme") else "solid state"


def _file_system(folder: Path, root: Path) -> str:
    """Type of the file system mounted deepest above a folder."""
    mounts = {}
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        place, _, rest = line.partition(" - ")
        words = place.split()
        if len(words) > 4 and rest:
            mounts[words[4].replace("\\040", " ")] = rest.split()[0]
    return next((mounts[str(path)] for path in (folder, *folder.parents) if str(path) in mounts), "")


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi reports and CUDA_VISIBLE_DEVICES leaves visible; empty if there is no driver."""
    return visible_gpus(
        _ask_driver("--query-gpu=index,uuid,name,memory.total,memory.free"), os.environ.get("CUDA_VISIBLE_DEVICES")
    )


def read_gpu_memory(pids: Container[int]) -> dict[str, int]:
    """Bytes that these processes hold of each GPU, by its UUID; {} where the driver names none of them, as it does in
    containers with process numbers of their own, or does not say how much."""
    held: dict[str, int] = {}
    for line in _ask_driver("--query-compute-apps=gpu_uuid,pid,used_memory").splitlines():
        uuid, pid, used = (cell.strip() for cell in line.split(","))
        if pid.isdigit() and int(pid) in pids and used.isdigit():
            held[uuid] = held.get(uuid, 0) + _mebibytes(used)
    return held


def _ask_driver(query: str) -> str:
    """nvidia-smi's answer, a row a line; "" without a GPU."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) or not (program := shutil.which("nvidia-smi")):
        return ""
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def visible_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs of an nvidia-smi listing that CUDA will show; it stops at the first unknown name."""
    gpus: dict[str, Gpu] = {}
    uuids: dict[str, str] = {}
    for line in listing.strip().splitlines():
        index, uuid, name, total, free = (cell.strip() for cell in line.split(","))
        gpus[index] = Gpu(int(index), name, _mebibytes(total), _mebibytes(free), uuid)
        uuids[uuid] = index
    if visible is None:
        return tuple(gpus.values())
    shown = []
    for wanted in visible.split(","):
        index = next((uuids[uuid] for uuid in uuids if wanted and uuid.startswith(wanted.strip())), wanted.strip())
        if index not in gpus:
            break
        shown.append(gpus[index])
    return tuple(shown)


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Route:
    """How this host reaches another: through which network interface, and with which of its own addresses."""

    interface: str
    address: str


def route_to(address: str) -> Route | None:
    """The route to an address, including this host's own ones; None for the loopback, and if there is no route."""
    import psutil

    try:
        (family, kind, _, _, place), *_ = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # a UDP socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = (name for name, places in psutil.net_if_addrs().items() if own in (place.address for place in places))
    return next((Route(name, own) for name in found if name != "lo"), None)


def user_name() -> str:
    """This user's name, or number: in a container the user may have no name."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, judged by its version, without importing it."""
    from importlib import metadata

    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return True
