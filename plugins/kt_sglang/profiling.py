"""SGLang's own profiler, asked by /start_profile.

Trigger: a second start while a first one runs starts torch's profiler inside itself, of which the scheduler may die.
Safe because SGLang means to refuse it: it says so, and starts all the same. Remove when it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_start_profile(original: Callable[..., Any], manager: Any, stage: Any = None) -> Any:
    """AROUND hook of `SchedulerProfilerManager._start_profile`: one at a time."""
    if not manager.profile_in_progress:
        return original(manager, stage)
    from sglang.srt.managers.io_struct import ProfileReqOutput

    return ProfileReqOutput(success=False, message="Profiling is already in progress. Call /stop_profile first.")
