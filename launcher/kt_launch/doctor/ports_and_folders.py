"""Ports and folders on this machine that a config names: whether they can be listened on and written to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kt_launch.config.schema import Config
from kt_launch.doctor import Finding
from kt_launch.machine.folders import check_own_folders, runs_folder
from kt_launch.machine.host import LOOPBACK, read_disk
from kt_launch.machine.ports import probe_port
from kt_model.errors import Problems
from kt_model.units import GIB
from kt_model.user_paths import cache_root

LEAST_DISK_BYTES = GIB


def check_ports(config: Config) -> Finding:
    """Those that are typed can be listened on; where none is, any."""
    server = config.server
    typed = {"server.port": server.port, "server.metrics_port": server.metrics_port}
    typed |= {"server.playground_port": server.playground_port, "server.adapters_port": server.adapters_port}
    wanted = {key: number for key, number in typed.items() if number} or {"server.port": 0}
    for key, number in wanted.items():
        host = LOOPBACK if key == "server.playground_port" else server.host
        port = probe_port(host, number)
        if not port.free:
            fix = f"Stop it, or set {key}=0 for a free port." if port.number else "Check the network permissions."
            return Finding("fail", f"{key}: {port.number} on {host} cannot be used: {port.owner}", fix)
    numbers = " and ".join(str(number) for number in wanted.values() if number) or "a free port"
    return Finding("pass", f"{numbers} on {server.host} can be used")


def check_disk(config: Config) -> Finding:
    """Runs need little; the experts that are kept as the kernels pack them are as large as the model."""
    found = {use: (folder, read_disk(folder)) for use, folder in _written(config).items()}
    detail = "; ".join(
        f"{disk.free_bytes / GIB:.1f} GiB free for {use} in {folder} (disk: {disk.kind})"
        for use, (folder, disk) in found.items()
    )
    if any(disk.free_bytes < LEAST_DISK_BYTES for _, disk in found.values()):
        return Finding("warn", detail, "Free some, or set KT_LAUNCH_RUNS and KT_LAUNCH_CACHE to another disk.")
    return Finding("pass", detail)


def check_permissions(config: Config) -> Finding:
    """Without a place for runs nothing starts; without one for the cache every start packs the experts again."""
    runs, cache = _written(config).values()
    if problem := _refusal(runs):
        return Finding("fail", problem, "Set KT_LAUNCH_RUNS to a folder that you can write.")
    if problem := _refusal(cache):
        return Finding("warn", problem, "Set KT_LAUNCH_CACHE to a folder that you can write.")
    return Finding("pass", f"{runs} and {cache} can be written")


def _written(config: Config) -> dict[str, Path]:
    """Raises LaunchError where one can be no folder."""
    check_own_folders(config.paths.runs, problems := Problems())
    problems.raise_if_any()
    return {"runs": runs_folder(config.paths.runs), "packed experts": cache_root()}


def _refusal(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as failure:
        return f"cannot write into {folder} ({failure.strerror})"
