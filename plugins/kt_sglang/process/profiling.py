"""SGLang's own profiler, started by /start_profile.

Trigger: starting it twice starts torch's profiler inside itself, which may kill the scheduler. Safe because SGLang
intends to refuse it: it reports an error, but starts anyway. Remove when it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_start_profile(original: Callable[..., Any], manager: Any, stage: Any = None) -> Any:
    """AROUND hook of `SchedulerProfilerManager._start_profile`: one profile at a time."""
    if not manager.profile_in_progress:
        return original(manager, stage)
    from sglang.srt.managers.io_struct import ProfileReqOutput

    return ProfileReqOutput(success=False, message="Profiling is already in progress. Call /stop_profile first.")
