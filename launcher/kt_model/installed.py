"""What is installed: the product, the SGLang that it is made for, and packages by name."""

from __future__ import annotations

import platform
from importlib import metadata

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


def sglang_requirement() -> str:
    """The SGLang that the product is made for, as pip takes it (sglang==<version>): that of the extra `gpu`. It has no
    version where the product is not installed."""
    wanted = metadata.requires(PRODUCT) if version_of(PRODUCT) else None
    return next((line.partition(";")[0].strip() for line in wanted or () if line.startswith("sglang==")), "sglang")


def versions() -> dict[str, str]:
    """Versions of the packages that decide how fast and how exact a server is."""
    found = {name: version_of(name) for name in (PRODUCT, "sglang", "torch", "transformers")}
    return {**{name: version for name, version in found.items() if version}, "Python": platform.python_version()}
