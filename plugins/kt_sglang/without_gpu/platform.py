"""SGLang's platform for a machine without an accelerator.

Trigger: stock's own CPU platform needs `sgl_kernel`'s CPU operators, which no package on PyPI carries. Safe because
everything here is torch's. Remove when stock SGLang serves on a CPU from PyPI alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch.profiler import ProfilerActivity


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Torch-only CPU platform."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """The only attention backend that needs nothing but torch."""
        return "torch_native"

    def get_torch_profiler_activity_str(self) -> str:
        """The activity recorded by /start_profile; without a name for it, that request kills the scheduler."""
        return "CPU"

    def get_torch_profiler_activity(self) -> ProfilerActivity:
        """The activity of that name."""
        return ProfilerActivity.CPU

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """False: there is no device to pin for."""
        return False
