"""Facts of the machine that a measurement depends on. Reads /proc and /sys; measures nothing."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

import kt_kernels

MIB = 1 << 20


def _first_line(path: str, otherwise: str = "") -> str:
    try:
        return Path(path).read_text().partition("\n")[0].strip()
    except OSError:
        return otherwise


def cores() -> int:
    return len(os.sched_getaffinity(0))


def l3_bytes() -> int:
    """Of one socket, as the machine claims it; a virtual machine may own less of it. 32 MiB where it does not say."""
    size = _first_line("/sys/devices/system/cpu/cpu0/cache/index3/size", "32768K")
    return int(size[:-1]) * {"K": 1024, "M": MIB}.get(size[-1], 1024)


def available_bytes() -> int:
    """What can be had without swapping, within the cgroup's limit."""
    limits = [_meminfo("MemAvailable")]
    maximum, used = _first_line("/sys/fs/cgroup/memory.max"), _first_line("/sys/fs/cgroup/memory.current")
    if maximum.isdigit() and used.isdigit():
        limits.append(int(maximum) - int(used))
    return min(limits)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes() -> int:
    return int(_first_line("/proc/self/statm").split()[1]) * resource.getpagesize()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def facts() -> dict[str, Any]:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    interesting = ["avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"]
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "flags": [flag for flag in interesting if flag in flags],
        "l3_mib": l3_bytes() // MIB,
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled", "unknown"),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isas": kt_kernels.isas(),
        "load_average": os.getloadavg()[0],
    }
