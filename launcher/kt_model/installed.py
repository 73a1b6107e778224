"""What is installed: the product, the SGLang that it is made for, and packages by name."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from shutil import which

PRODUCT = "kt-launch"


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def product() -> str:
    """Name and version of the product."""
    return f"{PRODUCT} {version_of(PRODUCT) or '(not installed)'}"


ROUTER = "sglang-router"


def requirement(package: str) -> str:
    """The version of a package that the product is made for, as pip takes it (package==version), from the product's
    extras. There is no version where the product is not installed."""
    wanted = metadata.requires(PRODUCT) if version_of(PRODUCT) else None
    return next((line.partition(";")[0].strip() for line in wanted or () if line.startswith(f"{package}==")), package)


def sglang_requirement() -> str:
    """The SGLang that the product is made for: that of the extra `gpu`."""
    return requirement("sglang")


def install_command(gpu: bool) -> str:
    """What a shell runs to install torch, SGLang and what it needs into this environment, where kt-launch is. From an
    index without CPU builds of torch, gigabytes of CUDA come along on a machine that has no GPU, and do no harm."""
    pip = _pip()
    if gpu:
        return f"{pip} '{PRODUCT}[gpu]'"
    return f"{pip} '{PRODUCT}[cpu]' && {pip} --no-deps {sglang_requirement()}"


def _pip() -> str:
    """What installs into this environment: its own pip; uv in an environment that uv made, which has none."""
    python = shlex.quote(sys.executable)
    if find_spec("pip"):
        return f"{python} -m pip install"
    if which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m ensurepip && {python} -m pip install"


def missing_packages() -> list[str]:
    """Of what a server is made of; imports nothing."""
    return [name for name in ("torch", "sglang") if find_spec(name) is None]


def versions() -> dict[str, str]:
    """Versions of the packages that decide how fast and how exact a server is."""
    found = {name: version_of(name) for name in (PRODUCT, "sglang", "torch", "transformers")}
    return {**{name: version for name, version in found.items() if version}, "Python": platform.python_version()}
