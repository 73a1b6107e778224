"""Arguments that no caller means to pass: an exception of one line that names the argument; no crash, no silence.

The plain errors (another dtype, another shape) are in test_bindings.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Layer, build, check, forward, random_batch, random_layer, random_lora

import kt_kernels

Arguments = dict[str, Any]
LAYER = random_layer(3, 40, 24)
LAYER.adapters[1] = random_lora(LAYER, 4)


@pytest.fixture(scope="module")
def moe() -> kt_kernels.MoE:
    return build(LAYER, "auto")


def arguments() -> Arguments:
    batch = random_batch(LAYER, 5, 2, slots=(-1, 1))
    out = torch.full((5, 40), 7.0)
    return {
        "x": batch.x,
        "topk_ids": batch.ids,
        "topk_weights": batch.weights,
        "adapter_slots": batch.slots,
        "out": out,
    }


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """A shape whose storage was given back, as sharded training leaves it."""
    shell = tensor.clone()
    shell.untyped_storage().resize_(0)
    return shell


class Broken:
    """An object that promises DLPack and does not keep it."""

    def __init__(self, device: Any = (1, 0), capsule: Any = 3) -> None:
        self.device, self.capsule = device, capsule

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule() if callable(self.capsule) else self.capsule


class WithoutDevice:
    def __dlpack__(self, **_: Any) -> Any:
        return 3


def consumed() -> Any:
    capsule = torch.zeros(5, 40).bfloat16().__dlpack__()
    torch.utils.dlpack.from_dlpack(capsule)
    return capsule


HOSTILE: dict[str, tuple[str, Callable[[Arguments], Any], type[Exception], str]] = {
    "meta": ("x", lambda a: a["x"].to("meta"), ValueError, "x: cannot be shared by DLPack"),
    "meta out": ("out", lambda a: a["out"].to("meta"), ValueError, "out: cannot be shared by DLPack"),
    "sparse": ("x", lambda a: a["x"].to_sparse(), ValueError, "x: cannot be shared by DLPack"),
    "negated": (
        "topk_weights",
        lambda a: torch._neg_view(a["topk_weights"]),
        ValueError,
        "topk_weights: is a negated view, expected plain values; call .resolve_neg() first",
    ),
    "freed": ("x", lambda a: freed(a["x"]), ValueError, "x: has no memory behind its shape (5, 40), expected values"),
    "freed out": ("out", lambda a: freed(a["out"]), ValueError, "out: has no memory behind its shape (5, 40)"),
    "gradient": ("out", lambda a: a["out"].requires_grad_(), ValueError, "out: cannot be shared by DLPack"),
    "scalar": ("x", lambda a: torch.tensor(1.0).bfloat16(), ValueError, "x: expected shape (any, 40), got ()"),
    "three dimensions": ("x", lambda a: a["x"][None], ValueError, "x: expected shape (any, 40), got (1, 5, 40)"),
    "no tokens": ("x", lambda a: a["x"][:0], ValueError, "topk_ids: expected shape (0, any), got (5, 2)"),
    "bool": ("topk_ids", lambda a: a["topk_ids"].bool(), TypeError, "expected dtype int32 or int64, got bool"),
    "uint64": ("topk_ids", lambda a: a["topk_ids"].numpy().astype(np.uint64), TypeError, "got uint64"),
    "float8": ("x", lambda a: a["x"].to(torch.float8_e4m3fn), TypeError, "x: expected dtype bfloat16, got DLPack type"),
    "complex": ("topk_weights", lambda a: a["topk_weights"] * 1j, TypeError, "expected dtype float32, got complex64"),
    "other byte order": (
        "topk_ids",
        lambda a: a["topk_ids"].numpy().astype(">i8"),
        ValueError,
        "topk_ids: cannot be shared by DLPack (DLPack only supports native byte order",
    ),
    "objects": ("topk_weights", lambda a: np.empty((5, 2), object), ValueError, "topk_weights: cannot be shared"),
    "upside down": (
        "topk_weights",
        lambda a: a["topk_weights"].numpy()[::-1],
        ValueError,
        "topk_weights: expected contiguous values, got strides (-2, 1)",
    ),
    "out upside down": (
        "out",
        lambda a: a["out"].numpy()[::-1],
        ValueError,
        "out: expected rows of contiguous values, got strides (-40, 1)",
    ),
    "out mirrored": ("out", lambda a: a["out"].numpy()[:, ::-1], ValueError, "got strides (40, -1)"),
    "rows over each other": (
        "out",
        lambda a: torch.zeros(200).as_strided((5, 40), (8, 1)),
        ValueError,
        "strides (8, 1)",
    ),
    "id beyond 32 bits": ("topk_ids", lambda a: a["topk_ids"] + 2**32, ValueError, "topk_ids[0, 0]: expert 429496729"),
    "slot beyond 32 bits": (
        "adapter_slots",
        lambda a: torch.full((5,), 2**32 + 1),
        ValueError,
        "adapter_slots[0]: no adapter in slot 4294967297, expected -1 (none) or a slot filled by set_adapter",
    ),
    "smallest slot": (
        "adapter_slots",
        lambda a: torch.full((5,), -(2**63)),
        ValueError,
        "no adapter in slot -92233720",
    ),
    "no device": ("x", lambda a: WithoutDevice(), ValueError, "x: cannot be shared by DLPack"),
    "odd device": ("x", lambda a: Broken(device=7), ValueError, "x: cannot be shared by DLPack"),
    "device of three": ("x", lambda a: Broken(device=(1, 0, 0)), ValueError, "x: __dlpack_device__ is no pair"),
    "no capsule": ("x", lambda a: Broken(), ValueError, "x: cannot be shared by DLPack"),
    "used capsule": ("x", lambda a: Broken(capsule=consumed), ValueError, "x: cannot be shared by DLPack"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_forward_refuses(moe: kt_kernels.MoE, case: str) -> None:
    name, change, error, message = HOSTILE[case]
    call = arguments()
    expected = forward_of(moe)
    with pytest.raises(error, match=re.escape(message)) as caught:
        moe.forward(**(call | {name: change(call)}))
    assert "\n" not in str(caught.value), "one line"
    assert (call["out"].detach() == 7).all(), "nothing was written"
    assert torch.equal(forward_of(moe), expected), "and the layer goes on"


def forward_of(moe: kt_kernels.MoE) -> torch.Tensor:
    call = arguments()
    moe.forward(**call)
    return call["out"]


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights", "adapter_slots"])
def test_out_over_any_input_is_refused(moe: kt_kernels.MoE, name: str) -> None:
    """It would be read after it was written, and the caller's tensor would be another."""
    call = arguments()
    memory = torch.zeros(1000, dtype=torch.uint8)
    call["out"] = memory[:800].view(torch.float32).view(5, 40)
    size = call[name].nbytes
    inside = memory[800 - size : 800].view(call[name].dtype).view(call[name].shape)
    call[name] = inside
    with pytest.raises(ValueError, match=f"out: shares memory with {name}, expected memory of its own"):
        moe.forward(**call)
    behind = memory[800 : 800 + size].view(call[name].dtype).view(call[name].shape) if size <= 200 else None
    if behind is not None:
        moe.forward(**(call | {name: behind.copy_(arguments()[name])}))  # next to each other is fine
        assert torch.equal(call["out"], forward_of(moe))


def test_x_and_out_may_be_neighbours(moe: kt_kernels.MoE) -> None:
    """The last row ends with its last value, not with the distance to a next row."""
    call = arguments()
    memory = torch.zeros(4 * 100 + 40 + 200, dtype=torch.float32)
    call["out"] = memory[:440].as_strided((5, 40), (100, 1))
    behind = memory[440:540].view(torch.bfloat16).view(5, 40)
    moe.forward(**(call | {"x": behind.copy_(call["x"])}))
    assert torch.equal(call["out"], forward_of(moe))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; OnDevice stands for it in test_bindings.py")
def test_forward_refuses_a_cuda_tensor(moe: kt_kernels.MoE) -> None:
    call = arguments()
    with pytest.raises(ValueError, match=r"x: is on a device \(DLPack type 2\), expected CPU memory"):
        moe.forward(**(call | {"x": call["x"].cuda()}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_show_in_their_token_only(isa: str, method: str, bad: float) -> None:
    """No exception: one token's broken router must not end the batch. No silence either."""
    layer = random_layer(3, 40, 24)
    moe = build(layer, isa, method)
    batch = random_batch(layer, 5, 2)
    clean = forward(moe, batch)
    batch.weights[2, 1] = bad
    found = forward(moe, batch)
    assert not torch.isfinite(found[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])
    batch.ids[2, 1] = -1
    assert torch.isfinite(forward(moe, batch)).all(), "a pair that is skipped is not read"


FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "plain": lambda t: t,
    "clone": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "wide rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "one less": lambda t: t[:-1],
    "narrow": lambda t: t[..., :-1],
    "one more dimension": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "float64": lambda t: t.double(),
    "int8": lambda t: t.to(torch.int8),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
    "empty": lambda t: t[:0],
    "none": lambda t: None,
    "list": lambda t: t.tolist(),
    "huge": lambda t: t + 2**40,
    "negative": lambda t: -t - 1,
}
NAMES = ["x", "topk_ids", "topk_weights", "adapter_slots", "out"]


@settings(max_examples=300, deadline=None)
@given(forms=st.tuples(*(st.sampled_from(["plain"] * len(FORMS) + list(FORMS)) for _ in NAMES)))
def test_any_mixture_of_arguments_is_served_or_refused_by_name(moe: kt_kernels.MoE, forms: tuple[str, ...]) -> None:
    call = {name: FORMS[form](value) for form, (name, value) in zip(forms, arguments().items(), strict=True)}
    try:
        moe.forward(**call)
    except (TypeError, ValueError) as error:
        assert re.match(rf"({'|'.join(NAMES)})[:\[]", str(error)), str(error)
        assert "\n" not in str(error)
    else:
        assert torch.isfinite(call["out"]).all()
        clean = {"out": torch.empty(call["out"].shape)}
        moe.forward(**(call | clean))
        assert torch.equal(call["out"].float(), clean["out"].to(call["out"].dtype).float())


UNTYPED: Any = kt_kernels
"""For calls that no type checker lets through."""


def make(**changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "num_experts": 2,
        "hidden_size": 8,
        "intermediate_size": 4,
        "pool": kt_kernels.ThreadPool(1),
    }
    return kt_kernels.MoE(**(sizes | changes))


@pytest.mark.parametrize("name", ["num_experts", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("size", [2**30 + 1, 2**62, 2**63 - 1])
def test_sizes_that_no_byte_count_can_hold_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at most 1073741824, got {size}"):
        make(**{name: size})


def test_a_layer_larger_than_all_addresses_is_refused() -> None:
    with pytest.raises(ValueError, match="have more weights than a process can address, expected less"):
        make(num_experts=2**20, hidden_size=2**20, intermediate_size=2**20)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: make(hidden_size=2.5), "hidden_size=2.5"),
        (lambda: make(num_experts="two"), "num_experts='two'"),
        (lambda: make(pool=2), "pool=2"),
        (lambda: make(packed="abc"), "packed[0]: expected an array of uint8, got str"),
        (lambda: make().set_adapter("0", None), "slot: "),
        (lambda: make().set_adapter(2**70, None), "slot: "),
        (lambda: make().set_adapter(0, "west"), "adapter: "),
        (lambda: make().load_expert("0", None, None, None), "expert: "),
        (lambda: make(method="AMXINT8_SFT").load_quantized_expert(0, [1]), "arrays: dict"),
        (lambda: make().set_profiling("yes"), "on: bool"),
        (lambda: make().forward(x=None), "topk_ids"),
        (lambda: UNTYPED.ThreadPool("2"), "threads: "),
        (lambda: kt_kernels.ThreadPool(2**31), "threads: "),
        (lambda: UNTYPED.packed_layout(method="AMXINT8_SFT", pool=None), "pool=None"),
        (lambda: UNTYPED.quantize_expert(None, None, None, "AMXINT8_SFT"), "gate: expected a tensor"),
    ],
)
def test_objects_of_another_type_are_refused(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(TypeError, match=re.escape(named)):
        call()


@pytest.mark.parametrize(
    ("threads", "nodes", "name"), [(4097, 1, "threads"), (10**6, 1, "threads"), (2, 4097, "nodes")]
)
def test_a_pool_of_absurd_size_is_refused(threads: int, nodes: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at most 4096, got {max(threads, nodes)}"):
        kt_kernels.ThreadPool(threads, nodes=nodes)


def run_alone(code: str) -> None:
    folder = str(Path(kt_kernels.__file__).resolve().parent.parent)
    lines = f"import sys; sys.path.insert(0, {folder!r})\nimport resource, torch, kt_kernels\n{code}"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_threads_that_the_system_does_not_give_are_named_and_the_pool_survives() -> None:
    """All or none: a pool that got half of its threads would be slow and never say why; one left locked would hang."""
    run_alone("""
pool = kt_kernels.ThreadPool(200)
moe = kt_kernels.MoE(num_experts=1, hidden_size=8, intermediate_size=4, pool=pool)
weights = [torch.zeros(4, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(8, 4).bfloat16()]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for _ in range(2):
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), hard))
    try:
        moe.load_expert(0, *weights)
        sys.exit("200 threads started in 200 MiB")
    except RuntimeError as error:
        assert str(error).startswith("threads: the system could start only "), error
        assert " of 200 (" in str(error), error
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
moe.load_expert(0, *weights)
""")


def test_memory_that_the_system_does_not_give_is_named() -> None:
    run_alone("""
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
try:
    kt_kernels.MoE(num_experts=1000, hidden_size=8192, intermediate_size=8192, pool=kt_kernels.ThreadPool(1))
    sys.exit("375 GiB were given out of 64")
except MemoryError as error:
    assert str(error) == "MoE: no memory for the weights of 1000 experts, hidden 8192, intermediate 8192", error
""")


def gate_only(a: torch.Tensor, b: torch.Tensor, **options: Any) -> kt_kernels.Adapter:
    return kt_kernels.Adapter(a, b, None, None, None, None, **options)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((0, 2, 40), (0, 24, 2), "got 0, 40 and 24"),
        ((3, 2, 0), (3, 24, 2), "got 3, 0 and 24"),
        ((3, 2, 40), (3, 0, 2), "got 3, 40 and 0"),
    ],
)
def test_adapters_of_nothing_are_refused(a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"adapter: expected .* 1 expert, hidden 1 and intermediate 1, {message}"):
        gate_only(torch.zeros(a), torch.zeros(b))


def test_adapters_that_cannot_be_read_are_refused() -> None:
    a, b = torch.zeros(3, 2, 40), torch.zeros(3, 24, 2)
    with pytest.raises(ValueError, match="gate_a: cannot be shared by DLPack"):
        gate_only(a.to("meta"), b)
    with pytest.raises(ValueError, match="gate_b: cannot be shared by DLPack"):
        gate_only(a, b.clone().requires_grad_())
    with pytest.raises(ValueError, match=re.escape("gate_a: has no memory behind its shape (3, 2, 40)")):
        gate_only(freed(a), b)
    with pytest.raises(ValueError, match="gate_a: expected contiguous values"):
        gate_only(a[:1].expand(3, 2, 40), b)
    with pytest.raises(ValueError, match="gate_a: holds NaN or infinity"):
        gate_only(a + 3.4e38, b)  # beyond what bfloat16 holds
    with pytest.raises(ValueError, match="scale: expected a finite number, got inf"):
        gate_only(a, b, scale=1e300)


def test_a_rank_far_above_every_size_is_served(isa: str) -> None:
    layer = random_layer(2, 40, 24)
    layer.adapters[0] = random_lora(layer, 1000)
    check(layer, build(layer, isa), random_batch(layer, 5, 2, slots=(-1, 0)))


@pytest.mark.parametrize("shape", [(0, 0), (0, 40), (24, 0)])
def test_quantizing_nothing_is_refused(shape: tuple[int, int]) -> None:
    wide = torch.zeros(shape).bfloat16()
    message = f"gate: expected at least one row and one input, got ({shape[0]}, {shape[1]})"
    with pytest.raises(ValueError, match=re.escape(message)):
        kt_kernels.quantize_expert(wide, wide, wide.t().contiguous(), "AMXINT8_SFT")


def test_arrays_of_another_format_are_refused() -> None:
    """A zero point that is not read would mean other weights."""
    layer: Layer = random_layer(1, 40, 24)
    moe = build(layer, "auto", "AMXINT8_SFT")
    arrays = kt_kernels.quantize_expert(*layer.matrices(0), "AMXINT8_SFT")
    with pytest.raises(ValueError, match="arrays: 'gate_zero' is not known, expected gate, gate_scale, up"):
        moe.load_quantized_expert(0, arrays | {"gate_zero": arrays["gate"]})
    with pytest.raises(ValueError, match="gate_scale: cannot be shared by DLPack"):
        moe.load_quantized_expert(0, arrays | {"gate_scale": arrays["gate_scale"].astype(">f4")})
    with pytest.raises(TypeError, match="gate: expected a tensor or array with __dlpack__, got NoneType"):
        moe.load_quantized_expert(0, arrays | {"gate": None})
    with pytest.raises(ValueError, match="expert: expected 0 to 0, got -1"):
        moe.load_quantized_expert(-1, arrays)


def test_weights_that_cannot_be_read_leave_the_expert_as_it_was() -> None:
    layer = random_layer(2, 40, 24)
    moe: Any = build(layer, "auto")
    batch = random_batch(layer, 4, 2)
    before = forward(moe, batch)
    gate, up, down = layer.matrices(0)
    for bad in (gate.to("meta"), freed(gate), None, gate.float(), gate[:1].expand(24, 40), gate.t()):
        with pytest.raises((TypeError, ValueError), match=r"^gate: "):
            moe.load_expert(0, bad, up, down)
    assert torch.equal(forward(moe, batch), before)
