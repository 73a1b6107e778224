"""Typed face of the compiled kernels: routed experts with LoRA on the CPU. All work is in the extension `_core`."""

try:
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
except ImportError as failure:
    if isinstance(failure.__cause__, KeyboardInterrupt):  # Ctrl-C while pybind11 set the extension up
        raise failure.__cause__ from None
    raise

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
