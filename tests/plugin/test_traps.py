"""Traps between SGLang's device and the kernels; tests/kernels/test_traps.py has the table of all traps.

The copies of an accelerator cannot run on a CPU: there the order of calls is watched, with the device's part played.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kt_kernels

T, K, E, H, I, R = 5, 2, 4, 64, 48, 4  # noqa: E741  # tokens, top-k, experts, hidden, intermediate, rank


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


def test_copies_from_a_device_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four copies are on their way before the one wait, and nothing is read before it."""
    from kt_sglang.moe import transfer

    events: list[str] = []

    class Host(torch.Tensor):  # type: ignore[misc]
        def contiguous(self, **_: Any) -> torch.Tensor:
            events.append("read")
            return torch.Tensor.contiguous(self)

    def copied(array: torch.Tensor) -> torch.Tensor:
        events.append("copy")
        return torch.zeros(array.shape, dtype=array.dtype).as_subclass(Host)

    def stream_of(device: torch.device) -> Any:
        assert device.type == "meta", "the stream of the batch's device"
        return SimpleNamespace(synchronize=lambda: events.append("wait"))

    monkeypatch.setattr(transfer, "_to_pinned", copied)
    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    x, ids, weights, slots = (torch.zeros(shape, device="meta") for shape in ((T, H), (T, K), (T, K), (T,)))
    transfer.HostBatch.gather(x, ids, weights, slots)
    assert events == ["copy"] * 4 + ["wait"] + ["read"] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; the test above watches the order of calls")
def test_a_batch_that_the_device_still_computes_arrives_whole() -> None:
    from kt_sglang.moe.transfer import HostBatch

    large = torch.randn(8192, 8192, device="cuda")
    for turn in range(5):
        late = (large @ large)[:T, :H] * 0 + turn  # queued behind milliseconds of work
        ids = torch.full((T, K), turn, device="cuda")
        found = HostBatch.gather(late, ids, late[:, :K], None)
        assert (found.x_TH == turn).all() and (found.ids_TK == turn).all() and (found.weights_TK == turn).all()


def pools() -> dict[str, torch.Tensor]:
    """SGLang's, of two slots, with a largest rank above the adapter's."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16() / 8

    most = R + 3
    return {
        "gate_up_lora_a_weights": random(2, E, 2 * most, H),
        "gate_up_lora_b_weights": random(2, E, 2 * I, most),
        "down_lora_a_weights": random(2, E, most, I),
        "down_lora_b_weights": random(2, E, H, most),
    }


def layer() -> kt_kernels.MoE:
    moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, pool=kt_kernels.ThreadPool(1))
    generator = torch.Generator().manual_seed(2)
    for expert in range(E):
        shapes = ((I, H), (I, H), (H, I))
        moe.load_expert(expert, *(torch.randn(shape, generator=generator).bfloat16() / 8 for shape in shapes))
    return moe


def output(moe: kt_kernels.MoE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, H, generator=generator).bfloat16()
    ids = torch.arange(T * K).reshape(T, K) % E
    out = torch.empty(T, H)
    moe.forward(x, ids, torch.ones(T, K), torch.ones(T, dtype=torch.int64), out)
    return out


def test_adapters_are_packed_on_the_host_whatever_the_default_device_and_dtype() -> None:
    """A rank below the pool's; the defaults are those of a GPU server."""
    from kt_sglang.adapters.lora import FusedMoEWithLoRA
    from kt_sglang.moe.placement import Placement

    held, moe = pools(), layer()
    wrapper = SimpleNamespace(**held, pools=tuple(held.values()), _packed_slots=set())
    wrapper.experts_method = SimpleNamespace(
        weights=SimpleNamespace(moe=moe, placement=Placement(E)), resident=SimpleNamespace(adapters=None)
    )
    wrapper._pools = lambda slot, experts: FusedMoEWithLoRA._pools(wrapper, slot, experts)  # type: ignore[arg-type]
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        FusedMoEWithLoRA._pack(wrapper, 1, R)  # type: ignore[arg-type]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert wrapper._packed_slots == {1}

    most = R + 3
    a, b = held["gate_up_lora_a_weights"][1], held["gate_up_lora_b_weights"][1]
    sides = {
        "gate_a": a[:, :R],
        "gate_b": b[:, :I, :R],
        "up_a": a[:, most : most + R],
        "up_b": b[:, I : 2 * I, :R],
        "down_a": held["down_lora_a_weights"][1, :, :R, :I],
        "down_b": held["down_lora_b_weights"][1, :, :, :R],
    }
    expected = layer()
    expected.set_adapter(1, kt_kernels.Adapter(**{name: side.contiguous() for name, side in sides.items()}))
    assert torch.equal(output(moe), output(expected))
