"""Machines as fixture trees: what /proc and /sys say of one, written below a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

GIB = 1 << 30
AVX2 = "fpu sse2 avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni"
AMX = f"{AVX512} amx_tile amx_bf16 amx_int8"


@dataclass(frozen=True)
class Machine:
    """nodes NUMA nodes of cores physical cores each, threads logical CPUs a core, siblings half the machine apart."""

    nodes: int = 1
    cores: int = 4
    threads: int = 1
    memory_bytes: int = 64 * GIB
    flags: str = AVX512
    vendor: str = "GenuineIntel"
    affinity: str = ""
    cgroup: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> int:
        return self.nodes * self.cores * self.threads

    def write(self, root: Path) -> Path:
        """All files of the tree; returns its root."""
        total = self.nodes * self.cores
        all_cpus = f"0-{self.cpus - 1}"
        tree = {
            "proc/cpuinfo": (
                f"processor\t: 0\nvendor_id\t: {self.vendor}\nmodel name\t: Test CPU\nflags\t\t: {self.flags}\n"
            ),
            "proc/meminfo": f"MemTotal: {self.memory_bytes // 1024} kB\nMemAvailable: {self.memory_bytes // 2048} kB\n",
            "proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{self.affinity or all_cpus}\n",
            "proc/self/cgroup": self.cgroup,
            "sys/devices/system/cpu/online": all_cpus,
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        }
        for cpu in range(self.cpus):
            siblings = ",".join(str(cpu % total + thread * total) for thread in range(self.threads))
            tree[f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"] = f"{siblings}\n"
        for node in range(self.nodes):
            cpus = ",".join(str(cpu) for cpu in range(self.cpus) if cpu % total // self.cores == node)
            memory = self.memory_bytes // self.nodes // 1024
            tree[f"sys/devices/system/node/node{node}/cpulist"] = f"{cpus}\n"
            tree[f"sys/devices/system/node/node{node}/meminfo"] = (
                f"Node {node} MemTotal: {memory} kB\nNode {node} MemFree: {memory // 2} kB\n"
            )
        for name, text in (tree | self.files).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root
