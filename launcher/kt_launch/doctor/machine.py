"""The machine as a server would find it: CPU, memory, pages, GPU, limits."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kt_launch.doctor import Finding
from kt_launch.machine.host import UNLIMITED_BYTES, Host, read_disk, read_host
from kt_launch.machine.limits import Limits
from kt_launch.planning.threads import count_nodes, usable_threads
from kt_model.units import GIB

COPY_BYTES = 64 << 20
SLOW_COPY_BYTES_S = 2e9
LEAST_FILES, LEAST_THREADS = 4096, 512
LEAST_SHARED_BYTES = 64 << 20
LEAST_FREE_BYTES = 4 << 30
AMX_FIX = "Use Linux 5.16 or newer, and a container runtime whose seccomp profile lets arch_prctl through."


def check_amx() -> Finding:
    return describe_amx(read_host())


def describe_amx(host: Host) -> Finding:
    if "amx_tile" not in host.cpu_flags:
        return Finding("pass", "this CPU has no AMX, so no permission is needed")
    if not host.amx_permitted:
        return Finding("warn", f"the kernel refuses AMX; {host.instruction_set} is used, which is slower", AMX_FIX)
    return Finding("pass", "the kernel permits AMX")


def check_cpu() -> Finding:
    return describe_cpu(read_host())


def describe_cpu(host: Host) -> Finding:
    """How many threads the machine can use, and a warning if a quota leaves less than a whole core."""
    threads, source = usable_threads(host)
    detail = f"{threads} expert threads: {source.removeprefix('probed: ')}; {count_nodes(host)}"
    if host.quota_cpus is not None and host.quota_cpus < 1:
        return Finding("warn", detail, "Give the container at least one whole CPU.")
    return Finding("pass", detail)


def check_memory() -> Finding:
    return describe_memory(read_host())


def describe_memory(host: Host) -> Finding:
    """Free memory, also within the cgroup's limit."""
    limit = host.memory_limit_bytes
    detail = f"{host.available_bytes / GIB:.1f} of {host.memory_bytes / GIB:.1f} GiB available"
    if limit is not None and limit < host.memory_bytes:
        detail += f", {host.free_bytes / GIB:.1f} of {limit / GIB:.1f} GiB left by the cgroup"
    if host.free_bytes < LEAST_FREE_BYTES:
        return Finding(
            "warn", detail, "SGLang itself takes about 3 GiB: free some memory, or raise the container's limit."
        )
    return Finding("pass", detail)


def check_bandwidth() -> Finding:
    threads = usable_threads(read_host())[0]
    rate = measure_copy(threads)
    detail = f"{rate / 1e9:.0f} GB/s read and written by {threads} threads copying"
    if rate < SLOW_COPY_BYTES_S:
        return Finding("warn", detail, "This limits decoding speed: check what else runs on the machine.")
    return Finding("pass", detail)


def measure_copy(threads: int, rounds: int = 3) -> float:
    """Bytes per second that threads read and write together, the best of several rounds."""
    pairs = [(bytearray(COPY_BYTES), memoryview(bytearray(COPY_BYTES))) for _ in range(threads)]
    best = 0.0
    for _ in range(rounds):
        best = max(best, 2 * COPY_BYTES * threads / _together([_copier(target, source) for target, source in pairs]))
    return best


def _copier(target: bytearray, source: memoryview) -> Callable[[], None]:
    to = (ctypes.c_char * len(target)).from_buffer(target)
    come = (ctypes.c_char * len(source)).from_buffer(source)

    def copy() -> None:
        ctypes.memmove(to, come, len(target))

    return copy


def _together(tasks: list[Callable[[], None]]) -> float:
    """Seconds until all have run, each in a thread; memmove releases the GIL."""
    threads = [threading.Thread(target=task) for task in tasks]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def check_huge_pages() -> Finding:
    return describe_huge_pages(read_host())


def describe_huge_pages(host: Host) -> Finding:
    detail = f"transparent huge pages: {host.huge_pages}"
    if host.huge_pages == "never":
        fix = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("warn", f"{detail}; weights are read up to a fifth slower", fix)
    return Finding("pass", detail)


def check_gpu() -> Finding:
    host = read_host()
    if not host.gpus:
        return Finding("pass", "no GPU: the server runs on the CPU")
    names = ", ".join(f"{gpu.name} ({gpu.free_bytes / GIB:.0f} GiB free)" for gpu in host.gpus)
    if not host.cuda_torch:
        return Finding("warn", f"{names}, but torch is a CPU build", "Run pip install kt-launch[gpu].")
    import torch

    if not torch.cuda.is_available():
        return Finding("fail", f"{names}, but torch cannot use it", "Match the driver and torch's CUDA version.")
    return Finding("pass", names)


def check_shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("warn", "no /dev/shm", "Mount a tmpfs there: SGLang's processes share memory through it.")
    free = read_disk(folder).free_bytes
    detail = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free < LEAST_SHARED_BYTES:
        return Finding("warn", detail, "Start the container with --shm-size=1g.")
    return Finding("pass", detail)


def check_limits() -> Finding:
    return describe_limits(read_host().limits)


def describe_limits(limits: Limits) -> Finding:
    """Limits of a shell or a container; what a launch needs is checked by the plan."""
    known = {
        f"{limits.open_files} open files": limits.open_files,
        f"{limits.threads_left} more processes and threads": limits.threads_left,
        f"{(limits.address_space_bytes or 0) / GIB:.1f} GiB of addresses": limits.address_space_bytes,
    }
    detail = ", ".join(text for text, value in known.items() if value is not None) or "none"
    for value, least, fix in (
        (limits.open_files, LEAST_FILES, f"Run ulimit -n {LEAST_FILES} before starting."),
        (limits.threads_left, LEAST_THREADS, "Raise ulimit -u, or the container's limit of pids."),
        (limits.address_space_bytes, UNLIMITED_BYTES, "Run ulimit -v unlimited before starting."),
    ):
        if value is not None and value < least:
            return Finding("warn", detail, fix)
    return Finding("pass", detail)
