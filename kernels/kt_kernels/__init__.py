"""Typed face of the compiled kernels: routed experts with LoRA on the CPU. All work is in the extension `_core`."""

from kt_kernels._core import (
    Adapter,
    HostCall,
    HostRecord,
    Mailbox,
    MoE,
    ThreadPool,
    compiled_isas,
    isas,
    methods,
    packed_adapter_bytes,
    packed_bytes,
    packed_layout,
    quantize_expert,
    scratch_bytes,
)

__all__ = [
    "Adapter",
    "HostCall",
    "HostRecord",
    "Mailbox",
    "MoE",
    "ThreadPool",
    "compiled_isas",
    "isas",
    "methods",
    "packed_adapter_bytes",
    "packed_bytes",
    "packed_layout",
    "quantize_expert",
    "scratch_bytes",
]
