"""The SGLang plugin: what `sglang.srt.plugins` and `sglang.srt.platforms` call, and nothing else.

Both entry points do nothing unless the process was started by `python -m kt_sglang.server`: a plain
`sglang serve` in an environment that has this wheel installed stays plain.
"""

from __future__ import annotations

_active = False


def activate() -> None:
    """Mark this process as one of ours; `kt_sglang.server` calls it at import, so spawned children do too."""
    global _active
    _active = True


def register() -> None:
    """Entry point of `sglang.srt.plugins`: registers our hooks (SGLang applies them right afterwards)."""
    if _active:
        from kt_sglang.hooks import register_hooks

        register_hooks()


def activate_platform() -> str | None:
    """Entry point of `sglang.srt.platforms`: our CPU platform if there is no accelerator, else None."""
    if not _active:
        return None
    import torch

    return None if torch.cuda.is_available() else "kt_sglang.without_gpu.platform.CpuPlatform"
