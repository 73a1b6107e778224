"""Copies a batch from the model's device to host memory and back; on a CPU device nothing is copied.

Shapes: T tokens, K top-k, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from kt_model.contract import NO_ADAPTER


@dataclass(frozen=True)
class HostBatch:
    """One layer's batch in host memory: contiguous, in kt_kernels' dtypes, and read-only.

    x_TH bfloat16; ids_TK int32, negative: not a CPU expert; weights_TK float32; slots_T int32, -1: no adapter, or None.
    """

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    slots_T: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def gather(
        cls, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, slots_T: torch.Tensor | None
    ) -> HostBatch:
        """Copy a batch to the host. On an accelerator, the copies are enqueued on the current stream and waited for."""
        arrays = (
            x_TH.to(torch.bfloat16),
            ids_TK.to(torch.int32),
            weights_TK.to(torch.float32),
            None if slots_T is None else slots_T.to(torch.int32),
        )
        if x_TH.device.type != "cpu":
            arrays = tuple(None if a is None else _to_pinned(a) for a in arrays)  # type: ignore[assignment]
            torch.cuda.current_stream(x_TH.device).synchronize()
        x, ids, weights, slots = (None if a is None else a.contiguous() for a in arrays)
        assert x is not None and ids is not None and weights is not None
        return cls(x, ids, weights, slots, x_TH.dtype, x_TH.device)

    @property
    def slots(self) -> list[int]:
        """One slot for each token."""
        return [NO_ADAPTER] * len(self.x_TH) if self.slots_T is None else self.slots_T.tolist()

    def give_back(self, out_TH: torch.Tensor) -> torch.Tensor:
        """The result on the caller's device and in its dtype."""
        return out_TH.to(device=self.device, dtype=self.dtype)


def _to_pinned(array: torch.Tensor) -> torch.Tensor:
    return pinned(*array.shape, dtype=array.dtype).copy_(array, non_blocking=True)


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """What is enqueued within goes to this stream, if there is one."""
    with torch.cuda.stream(stream) if stream else nullcontext():
        yield


def pinned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Pinned host memory, for direct copies by the device. Raises RuntimeError with the cause if there is none: CUDA's
    own message would suggest that the device is full."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as failure:
        size = prod(shape) * dtype.itemsize
        raise RuntimeError(f"kt_sglang: {size} bytes of host memory cannot be pinned: {failure}") from failure
