"""Where quantized experts are looked for and made when no folder is typed, and what is said when there are none."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from kt_launch.sources import Sources
from kt_launch.weights.experts import ExpertSource, fingerprint


def cache_root() -> Path:
    """The user's cache, or KT_LAUNCH_CACHE."""
    from platformdirs import user_cache_dir

    return (
        Path(os.environ.get("KT_LAUNCH_CACHE") or user_cache_dir("kt-launch", appauthor=False)).expanduser().absolute()
    )


def weights_root() -> Path:
    return cache_root() / "weights"


def own_folder(source: ExpertSource, method: str) -> Path:
    """The folder of this checkpoint's experts in this method, below the cache."""
    return weights_root() / f"{source.base.path.name}-{method}-{fingerprint(source)[:16]}"


def quantize_command(sources: Sources, method: str) -> str:
    """What to type to make the folder that is missing."""
    kept = ("model", "kt=", "kt.method=", "kt.weight_path=", "paths.models=")
    words = [text for text in sources.typed if text.startswith(kept)]
    if not any(word.startswith(("kt=", "kt.method=")) for word in words):
        words.append(f"kt.method={method}")
    return " ".join(["kt-launch", "action=quantize", *(shlex.quote(word) for word in words)])
