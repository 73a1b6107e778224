"""Checks of the installation and of this machine, each with what to do. A new check is a function and a row.

Each check examines one thing, imports what it needs itself, and never raises: a failure inside it becomes its finding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kt_launch.config.schema import Config
from kt_model.errors import LaunchError, LaunchErrors, errors_of

Status = Literal["pass", "warn", "fail"]

CHECKS: tuple[tuple[str, str], ...] = (
    ("python", "kt_launch.doctor.environment:check_python"),
    ("kt-launch", "kt_launch.doctor.environment:check_product"),
    ("torch", "kt_launch.doctor.environment:check_torch"),
    ("sglang", "kt_launch.doctor.environment:check_sglang"),
    ("sglang hooks", "kt_launch.doctor.environment:check_seams"),
    ("instruction sets", "kt_launch.doctor.kernels:check_instruction_sets"),
    ("kernel results", "kt_launch.doctor.kernels:check_forward"),
    ("AMX permission", "kt_launch.doctor.machine:check_amx"),
    ("CPU", "kt_launch.doctor.machine:check_cpu"),
    ("memory", "kt_launch.doctor.machine:check_memory"),
    ("memory bandwidth", "kt_launch.doctor.machine:check_bandwidth"),
    ("huge pages", "kt_launch.doctor.machine:check_huge_pages"),
    ("GPU", "kt_launch.doctor.machine:check_gpu"),
    ("shared memory", "kt_launch.doctor.machine:check_shared_memory"),
    ("limits", "kt_launch.doctor.machine:check_limits"),
)
CHECKS_OF_CONFIG: tuple[tuple[str, str], ...] = (
    ("ports", "kt_launch.doctor.ports_and_folders:check_ports"),
    ("disk", "kt_launch.doctor.ports_and_folders:check_disk"),
    ("permissions", "kt_launch.doctor.ports_and_folders:check_permissions"),
)
"""Checks that are passed the config, since they examine what it names."""


@dataclass(frozen=True)
class Finding:
    """A check's result: detail says what was found, fix what to do unless it passed."""

    status: Status
    detail: str
    fix: str = ""


def run_checks(config: Config, begins: Callable[[str], None]) -> Iterator[tuple[str, Finding]]:
    """Every check with its finding, one after another; `begins` is told the name of each before it runs."""
    for name, path in CHECKS + CHECKS_OF_CONFIG:
        begins(name)
        yield name, run_check(path, *([config] if (name, path) in CHECKS_OF_CONFIG else []))


def run_check(path: str, *subject: Config) -> Finding:
    """One check by module:function."""
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)(*subject)
    except (LaunchError, LaunchErrors) as mistakes:
        first = errors_of(mistakes)[0]
        return Finding("fail", f"{first.where}: {first.problem}", first.fix)
    except Exception as bug:
        return Finding("fail", f"the check itself failed: {bug!r}", "Report this with the output of kt-launch doctor.")
    assert isinstance(found, Finding)
    return found
