"""The installation: Python, the product, torch, SGLang, and whether SGLang matches all of the plugin's hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from kt_launch.doctor import Finding
from kt_launch.machine.host import read_host
from kt_model.installed import install_command, missing_packages, sglang_requirement, version_of

PYTHON = (3, 11)
AS_FOR_TORCH = "The command above."
SEAMS_TIMEOUT_S = 300
INSTALL_MISSING = (
    "Install the package that is missing: pip install kt-launch[cpu] brings what SGLang needs on a CPU, and "
    "pip install kt-launch[gpu] what it needs on a GPU."
)
DENIED = ("OSError", "PermissionError", "FileNotFoundError", "NotADirectoryError")
MAKE_POSSIBLE = "SGLang does this when it is imported: check the disk, and what HOME and TMPDIR name."


def check_python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < PYTHON:
        return Finding(
            "fail", f"Python {found}, 3.11 or newer is expected", "Create the environment with a newer Python."
        )
    return Finding("pass", f"Python {found}")


def check_product() -> Finding:
    found = version_of("kt-launch")
    if found is None:
        return Finding(
            "warn", "kt-launch runs from a checkout and is not installed", "Run pip install . in the checkout."
        )
    return Finding("pass", f"kt-launch {found}")


def check_torch() -> Finding:
    found = version_of("torch")
    if found is None:
        return Finding("fail", "torch is not installed", f"Run {_install_command()}")
    try:
        import torch
    except Exception as failure:
        return Finding("fail", f"torch {found} cannot be imported: {failure}", "Install torch again.")
    return Finding("pass", f"torch {torch.__version__}")


def _install_command() -> str:
    return install_command(gpu=bool(read_host().gpus))


def check_sglang() -> Finding:
    found, wanted = version_of("sglang"), sglang_requirement()
    if found is None:
        other = AS_FOR_TORCH if version_of("torch") is None else f"Run {_install_command()}"
        return Finding("fail", "sglang is not installed", other)
    if f"sglang=={found}" != wanted != "sglang":
        made_for = wanted.partition("==")[2]
        return Finding(
            "warn",
            f"sglang {found}; kt-launch is made for {made_for}",
            f"If the hooks do not match: pip install {wanted}.",
        )
    return Finding("pass", f"sglang {found}")


def check_seams() -> Finding:
    """In a child process, since hooks modify SGLang permanently."""
    if absent := missing_packages():
        return Finding("fail", f"not checked: {' and '.join(absent)} not installed", AS_FOR_TORCH)
    command = [sys.executable, "-P", "-m", "kt_sglang.seam_check"]
    try:
        with tempfile.TemporaryDirectory() as folder:  # torch wants one when it is imported, and a server has its own
            environ = {"TORCHINDUCTOR_CACHE_DIR": folder, **os.environ}
            done = subprocess.run(command, capture_output=True, text=True, timeout=SEAMS_TIMEOUT_S, env=environ)
    except subprocess.TimeoutExpired:
        return Finding(
            "fail", f"SGLang took longer to import than {SEAMS_TIMEOUT_S} s", "Check the machine's load and disk."
        )
    fix = f"Run pip install {sglang_requirement()}."
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        own = "kt_" in lines[-1].partition(":")[2]
        missing = lines[-1].startswith(("ModuleNotFoundError", "ImportError"))
        fix = "Install kt-launch again." if own else INSTALL_MISSING if missing else fix
        fix = MAKE_POSSIBLE if lines[-1].startswith(DENIED) else fix
        return Finding("fail", f"the plugin cannot be loaded: {lines[-1]}", fix)
    report = json.loads(done.stdout.splitlines()[-1])
    if report["not_imported"]:
        return Finding("fail", f"SGLang cannot be imported: {'; '.join(report['not_imported'])}", INSTALL_MISSING)
    if report["mistakes"]:
        return Finding("fail", "; ".join(report["mistakes"]), fix)
    return Finding("pass", f"all {report['seams']} SGLang hooks match")
