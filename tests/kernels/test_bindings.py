"""Every argument error: its type, and a message with the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import Batch, Layer, build, random_batch, random_layer, random_lora

import kt_kernels


@pytest.fixture
def layer() -> Layer:
    return random_layer(3, 40, 24)


@pytest.fixture
def moe(layer: Layer) -> kt_kernels.MoE:
    layer.adapters[1] = random_lora(layer, 4)
    return build(layer, "auto")


def arguments(layer: Layer) -> dict[str, Any]:
    batch = random_batch(layer, 5, 2, slots=(-1, 1))
    return {
        "x": batch.x,
        "topk_ids": batch.ids,
        "topk_weights": batch.weights,
        "adapter_slots": batch.slots,
        "out": torch.empty(5, 40),
    }


FORWARD_ERRORS: list[tuple[str, Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    ("x", lambda a: a["x"].float(), TypeError, "x: expected dtype bfloat16, got float32"),
    ("x", lambda a: a["x"].half(), TypeError, "x: expected dtype bfloat16, got float16"),
    ("x", lambda a: [1.0], TypeError, "x: expected a tensor or array with __dlpack__, got list"),
    ("x", lambda a: None, TypeError, "x: expected a tensor or array with __dlpack__, got NoneType"),
    ("x", lambda a: a["x"][:, :39].contiguous(), ValueError, "x: expected shape (any, 40), got (5, 39)"),
    ("x", lambda a: a["x"][0], ValueError, "x: expected shape (any, 40), got (40)"),
    (
        "x",
        lambda a: a["x"].t().contiguous().t(),
        ValueError,
        "x: expected rows of contiguous values, got strides (1, 5)",
    ),
    ("x", lambda a: a["x"][:1].expand(5, 40), ValueError, "x: expected rows of contiguous values, got strides (0, 1)"),
    ("x", lambda a: a["x"].float().requires_grad_().bfloat16(), ValueError, "x: cannot be shared by DLPack"),
    ("topk_ids", lambda a: a["topk_ids"].float(), TypeError, "topk_ids: expected dtype int32 or int64, got float32"),
    ("topk_ids", lambda a: a["topk_ids"].short(), TypeError, "topk_ids: expected dtype int32 or int64, got int16"),
    ("topk_ids", lambda a: a["topk_ids"][:4], ValueError, "topk_ids: expected shape (5, any), got (4, 2)"),
    ("topk_ids", lambda a: a["topk_ids"].t().contiguous().t(), ValueError, "topk_ids: expected contiguous values"),
    ("topk_ids", lambda a: a["topk_ids"] + 3, ValueError, "topk_ids[0, 0]: expert"),
    (
        "topk_weights",
        lambda a: a["topk_weights"].bfloat16(),
        TypeError,
        "topk_weights: expected dtype float32, got bfloat16",
    ),
    ("topk_weights", lambda a: a["topk_weights"][:, :1], ValueError, "topk_weights: expected shape (5, 2), got (5, 1)"),
    ("adapter_slots", lambda a: a["adapter_slots"].float(), TypeError, "adapter_slots: expected dtype int32 or int64"),
    ("adapter_slots", lambda a: a["adapter_slots"][:3], ValueError, "adapter_slots: expected shape (5), got (3)"),
    ("adapter_slots", lambda a: torch.full((5,), 0), ValueError, "adapter_slots[0]: no adapter in slot 0, expected -1"),
    ("adapter_slots", lambda a: torch.full((5,), 77), ValueError, "adapter_slots[0]: no adapter in slot 77"),
    ("adapter_slots", lambda a: torch.full((5,), -2), ValueError, "adapter_slots[0]: no adapter in slot -2"),
    ("out", lambda a: a["out"].half(), TypeError, "out: expected dtype bfloat16 or float32, got float16"),
    ("out", lambda a: a["out"][:, :20], ValueError, "out: expected shape (5, 40), got (5, 20)"),
    ("out", lambda a: a["out"].t().contiguous().t(), ValueError, "out: expected rows of contiguous values"),
    ("out", lambda a: a["x"], ValueError, "out: shares memory with x"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), FORWARD_ERRORS, ids=[message for *_, message in FORWARD_ERRORS]
)
def test_forward_refuses(
    layer: Layer,
    moe: kt_kernels.MoE,
    name: str,
    change: Callable[[dict[str, Any]], Any],
    error: type[Exception],
    message: str,
) -> None:
    call = arguments(layer)
    call[name] = change(call)
    with pytest.raises(error, match=re.escape(message)):
        moe.forward(**call)


class OnDevice:
    """A tensor of another device, as its library would present it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("the device is looked at first")


def test_forward_refuses_device_memory(layer: Layer, moe: kt_kernels.MoE) -> None:
    call = arguments(layer) | {"x": OnDevice()}
    with pytest.raises(ValueError, match=r"x: is on a device \(DLPack type 2\), expected CPU memory"):
        moe.forward(**call)


def test_forward_refuses_torchs_own_device_tensors(layer: Layer, moe: kt_kernels.MoE) -> None:
    call = arguments(layer)
    call["x"] = call["x"].to("meta")
    with pytest.raises((ValueError, BufferError, RuntimeError, NotImplementedError)):
        moe.forward(**call)


def test_forward_refuses_a_read_only_out(layer: Layer, moe: kt_kernels.MoE) -> None:
    out = np.zeros((5, 40), np.float32)
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out: is read-only, expected an array that can be written"):
        moe.forward(**(arguments(layer) | {"out": out}))


def test_numpy_arrays_pass(layer: Layer, moe: kt_kernels.MoE) -> None:
    call = arguments(layer)
    moe.forward(**call)
    arrays = {name: call[name].numpy() for name in ("topk_ids", "topk_weights", "adapter_slots")}
    arrays["topk_weights"].setflags(write=False)  # a read-only input is fine
    out = np.zeros((5, 40), np.float32)
    moe.forward(**(call | arrays | {"out": out}))
    assert np.array_equal(out, call["out"].numpy())


def test_inputs_are_never_changed(layer: Layer, isa: str) -> None:
    """The bug log's seventh row: topk_ids masked in place, hidden states reused."""
    moe = build(layer, isa)
    call = arguments(layer)
    call["topk_ids"][0, 0] = -1
    call["adapter_slots"] = torch.full((5,), -1)
    before = {name: value.clone() for name, value in call.items()}
    moe.forward(**call)
    for name in ("x", "topk_ids", "topk_weights", "adapter_slots"):
        assert torch.equal(call[name], before[name]), name


def test_nothing_is_written_when_an_argument_is_refused(layer: Layer, moe: kt_kernels.MoE) -> None:
    call = arguments(layer)
    call["topk_ids"][4, 1] = 9
    call["out"].fill_(7.0)
    with pytest.raises(ValueError, match=re.escape("topk_ids[4, 1]: expert 9 does not exist, expected less than 3")):
        moe.forward(**call)
    assert (call["out"] == 7).all()


def make(**changes: Any) -> kt_kernels.MoE:
    sizes: dict[str, Any] = {
        "num_experts": 2,
        "hidden_size": 8,
        "intermediate_size": 4,
        "pool": kt_kernels.ThreadPool(1),
    }
    return kt_kernels.MoE(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"hidden_size": -4}, "hidden_size: expected at least 1, got -4"),
        ({"intermediate_size": 0}, "intermediate_size: expected at least 1, got 0"),
        ({"method": "AMXFP8"}, "method: 'AMXFP8' is not known, expected AMXBF16_SFT, AMXINT8_SFT or AMXINT4_SFT"),
        ({"isa": "neon"}, "isa: 'neon' cannot run on this CPU or is not built in, expected auto or one of"),
    ],
)
def test_moe_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**changes)


def test_moe_needs_a_pool() -> None:
    with pytest.raises(TypeError):
        make(pool=None)


@pytest.mark.parametrize(
    ("threads", "nodes", "message"),
    [(0, 1, "threads: expected at least 1, got 0"), (2, 0, "nodes: expected at least 1, got 0")],
)
def test_pool_refuses(threads: int, nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kt_kernels.ThreadPool(threads, nodes=nodes)


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    plain = {"gate": torch.zeros(4, 8), "up": torch.zeros(4, 8), "down": torch.zeros(8, 4)}
    return {name: value.bfloat16() for name, value in plain.items()} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": torch.zeros(4, 8)}, TypeError, "gate: expected dtype bfloat16, got float32"),
        ({"up": torch.zeros(8, 4).bfloat16()}, ValueError, "up: expected shape (4, 8), got (8, 4)"),
        (
            {"down": torch.zeros(4, 8).bfloat16().t()},
            ValueError,
            "down: expected contiguous values, got strides (1, 8)",
        ),
    ],
)
def test_load_expert_refuses(changes: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make().load_expert(0, **weights(**changes))


@pytest.mark.parametrize("expert", [-1, 2])
def test_load_expert_refuses_a_missing_expert(expert: int) -> None:
    with pytest.raises(ValueError, match=f"expert: expected 0 to 1, got {expert}"):
        make().load_expert(expert, **weights())


def test_an_expert_without_weights_is_refused() -> None:
    moe = make()
    moe.load_expert(0, **weights())
    batch = Batch(torch.zeros(1, 8).bfloat16(), torch.tensor([[1]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match=re.escape("topk_ids[0, 0]: expert 1 has no weights; call load_expert")):
        moe.forward(batch.x, batch.ids, batch.weights, None, torch.empty(1, 8))


def sides(**changes: Any) -> dict[str, Any]:
    plain = {
        "gate_a": torch.zeros(2, 3, 8),
        "gate_b": torch.zeros(2, 4, 3),
        "up_a": torch.zeros(2, 3, 8),
        "up_b": torch.zeros(2, 4, 3),
        "down_a": torch.zeros(2, 3, 4),
        "down_b": torch.zeros(2, 8, 3),
    }
    return {name: value.bfloat16() for name, value in plain.items()} | changes


NAN = torch.full((2, 4, 3), float("nan")).bfloat16()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate_b": None}, ValueError, "gate_b: is None but gate_a is not, expected both or neither"),
        ({"up_a": None}, ValueError, "up_a: is None but up_b is not, expected both or neither"),
        (dict.fromkeys(sides()), ValueError, "adapter: all projections are None, expected at least one"),
        ({"gate_a": torch.zeros(2, 3, 8).half()}, TypeError, "gate_a: expected dtype bfloat16 or float32, got float16"),
        ({"gate_b": torch.zeros(2, 4, 2)}, ValueError, "gate_b: expected shape (2, any, 3), got (2, 4, 2)"),
        ({"up_b": torch.zeros(2, 5, 3)}, ValueError, "up_b: expected shape (2, 4, any), got (2, 5, 3)"),
        ({"down_a": torch.zeros(2, 3, 5)}, ValueError, "down_a: expected shape (2, any, 4), got (2, 3, 5)"),
        ({"down_b": torch.zeros(3, 8, 3)}, ValueError, "down_b: expected shape (2, any, 3), got (3, 8, 3)"),
        ({"gate_a": torch.zeros(2, 3)}, ValueError, "gate_a: expected shape (any, any, any), got (2, 3)"),
        ({"gate_a": torch.zeros(2, 8, 3).transpose(1, 2)}, ValueError, "gate_a: expected contiguous values"),
        ({"gate_b": NAN}, ValueError, "gate_b: holds NaN or infinity, expected finite values; check the adapter file"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ],
)
def test_adapter_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        kt_kernels.Adapter(**sides(**changes))


@pytest.mark.parametrize("slot", [-1, 4096])
def test_set_adapter_refuses_a_slot(slot: int) -> None:
    with pytest.raises(ValueError, match=f"slot: expected 0 to 4095, got {slot}"):
        make().set_adapter(slot, kt_kernels.Adapter(**sides()))


def test_set_adapter_refuses_another_shape() -> None:
    message = "adapter: made for 2 experts, hidden 8, intermediate 4, expected 2 experts, hidden 9, intermediate 4"
    with pytest.raises(ValueError, match=message):
        make(hidden_size=9).set_adapter(0, kt_kernels.Adapter(**sides()))


def test_objects_say_what_they_are() -> None:
    moe = make(method="AMXINT8_SFT", isa="reference")
    assert (moe.isa, moe.method) == ("reference", "AMXINT8_SFT")
    assert (moe.num_experts, moe.hidden_size, moe.intermediate_size) == (2, 8, 4)
    assert moe.packed_bytes > 0
    adapter = kt_kernels.Adapter(**sides(up_a=None, up_b=None), scale=0.5)
    assert (adapter.ranks, adapter.scale, adapter.num_experts) == ((3, 0, 3), 0.5, 2)


def test_auto_is_the_best_usable_isa() -> None:
    assert make().isa == kt_kernels.isas()[0]
    assert set(kt_kernels.isas()) <= set(kt_kernels.compiled_isas())
    assert "amx_model" not in kt_kernels.isas(), "the tile model is for tests only"
    assert kt_kernels.isas()[-1] == "reference"
