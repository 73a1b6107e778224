"""What is installed: the product, the SGLang version that it is made for, and packages by name."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from shutil import which

PRODUCT = "kt-launch"


def version_of(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def product() -> str:
    """Name and version of the product."""
    return f"{PRODUCT} {version_of(PRODUCT) or '(not installed)'}"


ROUTER = "sglang-router"


def requirement(package: str) -> str:
    """The version of a package that the product is made for, in pip's form (package==version), from the product's
    extras. Without a version if the product is not installed."""
    wanted = metadata.requires(PRODUCT) if version_of(PRODUCT) else None
    return next((line.partition(";")[0].strip() for line in wanted or () if line.startswith(f"{package}==")), package)


def sglang_requirement() -> str:
    """The SGLang that the product is made for, from the extra `gpu`."""
    return requirement("sglang")


def install_command(gpu: bool) -> str:
    """The shell command that installs torch, SGLang and its dependencies into kt-launch's environment. If the index has
    no CPU builds of torch, gigabytes of CUDA are installed even without a GPU, which does no harm."""
    pip = _pip()
    if gpu:
        return f"{pip} '{PRODUCT}[gpu]'"
    return f"{pip} '{PRODUCT}[cpu]' && {pip} --no-deps {sglang_requirement()}"


def _pip() -> str:
    """The installer of this environment: its own pip; uv in an environment made by uv, which has no pip."""
    python = shlex.quote(sys.executable)
    if find_spec("pip"):
        return f"{python} -m pip install"
    if which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m ensurepip && {python} -m pip install"


def missing_packages() -> list[str]:
    """The packages that a server consists of; imports nothing."""
    return [name for name in ("torch", "sglang") if find_spec(name) is None]


def versions() -> dict[str, str]:
    """Versions of the packages that determine a server's speed and accuracy."""
    found = {name: version_of(name) for name in (PRODUCT, "sglang", "torch", "transformers")}
    return {**{name: version for name, version in found.items() if version}, "Python": platform.python_version()}
