"""How a captured step passes a batch to kt_kernels and gets the result back. There are two ways, both launched on the
current stream and captured there: through the mailbox of a thread of ours (mailbox.cu: two small kernels, and no wait
for the driver), or, if that is unavailable, through copies and a host function of the stream.

Not here: what is captured and when (captured.py).

Shapes: T rows of the graph; K top-k; H hidden size.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

import kt_kernels
from kt_model.contract import HANDOVER, HOST_FUNCTION
from kt_sglang.moe.transfer import pinned as pinned_memory

logger = logging.getLogger(__name__)
THREADS = 1024
KERNEL_TIME_IS_LIMITED = 17
"""CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT: the device may drive a display, and a waiting kernel would be killed."""


@dataclass(frozen=True)
class HostBuffers:
    """Host memory for one layer's batch and its result, in kt_kernels' dtypes."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    slots_T: torch.Tensor
    out_TH: torch.Tensor

    @classmethod
    def allocate(cls, tokens: int, top_k: int, hidden: int, pinned: bool) -> HostBuffers:
        """x and out bfloat16, ids and slots int32, weights float32."""

        def buffer(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return pinned_memory(*shape, dtype=dtype) if pinned else torch.empty(shape, dtype=dtype, device="cpu")

        return cls(
            x_TH=buffer(tokens, hidden, dtype=torch.bfloat16),
            ids_TK=buffer(tokens, top_k, dtype=torch.int32),
            weights_TK=buffer(tokens, top_k, dtype=torch.float32),
            slots_T=buffer(tokens, dtype=torch.int32),
            out_TH=buffer(tokens, hidden, dtype=torch.bfloat16),
        )


@dataclass(frozen=True)
class DeviceBatch:
    """One layer's batch on the model's device; slots_T: None without adapters."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    slots_T: torch.Tensor | None

    def parts(self, host: HostBuffers) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (source, destination) to copy; a part is converted only if kt_kernels needs another dtype."""
        pairs = [(self.x_TH, host.x_TH), (self.ids_TK, host.ids_TK), (self.weights_TK, host.weights_TK)]
        if self.slots_T is not None:
            pairs.append((self.slots_T, host.slots_T))
        return [(part.to(buffer.dtype).contiguous(), buffer) for part, buffer in pairs]


class Handover(Protocol):
    """Both implementations launch everything on the current stream. A failed call leaves NaN, and its record says
    why."""

    def compute(self, call: kt_kernels.HostCall, batch: DeviceBatch, host: HostBuffers) -> torch.Tensor:
        """The result of a call that reads and writes `host`; on x's device and in its dtype."""

    def announce(self) -> None:
        """Announce that a step will be replayed."""


class HostFunctions:
    """Copies, and a host function that a thread of the driver calls. `launch` enqueues a C function and its argument on
    the current stream."""

    def __init__(self, launch: Callable[[int, int], None]) -> None:
        self._launch = launch

    def compute(self, call: kt_kernels.HostCall, batch: DeviceBatch, host: HostBuffers) -> torch.Tensor:
        for part, buffer in batch.parts(host):
            buffer.copy_(part, non_blocking=True)
        self._launch(call.function, call.argument)
        return torch.empty_like(batch.x_TH).copy_(host.out_TH, non_blocking=True)

    def announce(self) -> None:
        """Does nothing: the driver wakes its thread."""


class Copy(ctypes.Structure):
    """mailbox.cu's Copy."""

    _fields_ = (("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("bytes", ctypes.c_longlong))

    @classmethod
    def of(cls, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """All of a tensor; both contiguous, with the same size and dtype."""
        return cls(source.data_ptr(), target.data_ptr(), source.nbytes)


class Batch(ctypes.Structure):
    """mailbox.cu's Batch."""

    _fields_ = (("parts", Copy * 4),)


class Mailbox:
    """kt_kernels' thread, and the kernels through which the device communicates with it."""

    def __init__(self, launch: Callable[..., None], *, pinned: bool = True) -> None:
        """`launch(name, *arguments)` enqueues a kernel of mailbox.cu on the current stream."""
        words = kt_kernels.Mailbox.WORDS
        self.words = pinned_memory(words, dtype=torch.int32) if pinned else torch.zeros(words, dtype=torch.int32)
        self._box = kt_kernels.Mailbox(self.words)
        self._launch = launch

    def compute(self, call: kt_kernels.HostCall, batch: DeviceBatch, host: HostBuffers) -> torch.Tensor:
        number = ctypes.c_int(self._box.add(call))
        parts = batch.parts(host)
        copies = Batch((Copy * 4)(*(Copy.of(part, buffer) for part, buffer in parts)))
        self._launch("kt_hand_over", copies, self._word(kt_kernels.Mailbox.REQUEST), number)
        out_TH = torch.empty_like(batch.x_TH, dtype=host.out_TH.dtype, memory_format=torch.contiguous_format)
        self._launch("kt_take_back", Copy.of(host.out_TH, out_TH), self._word(kt_kernels.Mailbox.ANSWER), number)
        return out_TH.to(batch.x_TH.dtype)

    def _word(self, at: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.words[at:].data_ptr())

    def announce(self) -> None:
        self._box.announce()


def on_cuda() -> Handover:
    """The mailbox; or host functions, if the plan asks for them or the device does not allow waiting kernels."""
    why = _why_no_mailbox()
    if why is None:
        return Mailbox(launch_kernel)
    logger.info("kt_sglang: captured steps call kt_kernels by host functions: %s", why)
    return HostFunctions(launch_host_function)


def _why_no_mailbox() -> str | None:
    """Loads the kernels too: nothing can be loaded while a stream is captured."""
    if os.environ.get(HANDOVER) == HOST_FUNCTION:
        return "kt.handover asks for it"
    if _kernel_time_is_limited():
        return "the device also drives a display, where a kernel may not wait"
    try:
        _kernels()
    except RuntimeError as refusal:
        return str(refusal)
    return None


def launch_host_function(function: int, argument: int) -> None:
    """cuLaunchHostFunc on torch's current stream. Raises RuntimeError with the driver's number."""
    call = ctypes.c_void_p(function), ctypes.c_void_p(argument)
    _demand(_driver().cuLaunchHostFunc(_stream(), *call), "a host function")


def launch_kernel(name: str, *arguments: Any) -> None:
    """One block of a kernel of mailbox.cu on torch's current stream."""
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    _demand(_driver().cuLaunchKernel(_kernels()[name], 1, 1, 1, THREADS, 1, 1, 0, _stream(), pointers, None), name)


@cache
def _driver() -> ctypes.CDLL:
    """The driver's library, which torch has loaded: nothing of ours is linked to CUDA."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _kernels() -> dict[str, ctypes.c_void_p]:
    """mailbox.ptx in torch's context; the driver compiles it."""
    text = Path(__file__).with_name("mailbox.ptx").read_bytes() + b"\0"
    torch.cuda.current_stream().synchronize()  # torch has made its context by then
    module, found = ctypes.c_void_p(), dict[str, ctypes.c_void_p]()
    _demand(_driver().cuModuleLoadData(ctypes.byref(module), text), "mailbox.ptx")
    for name in ("kt_hand_over", "kt_take_back"):
        found[name] = ctypes.c_void_p()
        _demand(_driver().cuModuleGetFunction(ctypes.byref(found[name]), module, name.encode()), name)
    return found


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _kernel_time_is_limited() -> bool:
    value = ctypes.c_int()
    device = torch.cuda.current_device()
    _demand(_driver().cuDeviceGetAttribute(ctypes.byref(value), KERNEL_TIME_IS_LIMITED, device), "a device's attribute")
    return bool(value.value)


def _demand(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"kt_sglang: CUDA refused {what} (the driver's error {status})")
