"""The error for a method that needs quantized experts when there are none."""

from __future__ import annotations

from kt_launch.config.sources import Sources
from kt_model.errors import LaunchError, command
from kt_model.weights.locations import Experts


def missing_folder(method: str, sources: Sources, experts: Experts, given: str | None) -> LaunchError:
    """What was found instead of the folder, and the command that makes it."""
    found = f"no folder {experts.path}" if given else "no folder given"
    foreign = f"; {experts.foreign}" if experts.foreign else ""
    problem = f"{method} needs kt.weight_path ({found}{foreign})"
    return LaunchError("kt.method", problem, f"Run {quantize_command(sources, method)}, or add kt.prepare=true.")


def quantize_command(sources: Sources, method: str) -> str:
    """The command that makes the missing folder."""
    kept = ("model", "kt=", "kt.method=", "kt.weight_path=", "paths.models=")
    words = [text for text in sources.typed if text.startswith(kept)]
    if not any(word.startswith(("kt=", "kt.method=")) for word in words):
        words.append(f"kt.method={method}")
    return command("quantize", *words)
