"""AMXINT8_SFT and AMXINT4_SFT: the arrays of a file, what they lose, and that packing them loses nothing more."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    METHODS,
    Layer,
    build,
    dequantized,
    expected_forward,
    forward,
    random_batch,
    random_layer,
    relative_l2,
)

import kt_kernels

QUANTIZED = METHODS[1:]
MOST_ERROR = {"AMXBF16_SFT": 0.005, "AMXINT8_SFT": 0.028, "AMXINT4_SFT": 0.15}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 64), (45, 77), (33, 320)])
def test_arrays_pack_to_the_same_bits_as_weights(method: str, nodes: int, hidden: int, intermediate: int) -> None:
    """A file written anywhere serves any CPU and pool count."""
    layer = random_layer(2, hidden, intermediate)
    batch = random_batch(layer, 6, 2)
    direct = build(layer, "auto", method, nodes=nodes)
    expected = forward(direct, batch)
    from_file = build(layer, "auto", method, nodes=nodes)
    for expert in range(2):
        from_file.load_expert(expert, *(torch.zeros_like(matrix) for matrix in layer.matrices(expert)))
    assert forward(from_file, batch).abs().max() == 0
    for expert in range(2):
        from_file.load_quantized_expert(expert, kt_kernels.quantize_expert(*layer.matrices(expert), method))
    assert torch.equal(forward(from_file, batch), expected)


def test_array_types_and_sizes() -> None:
    layer = random_layer(1, 45, 77)
    int8 = kt_kernels.quantize_expert(*layer.matrices(0), "AMXINT8_SFT")
    assert {name: (array.dtype.name, array.shape) for name, array in int8.items()} == {
        "gate": ("int8", (77, 45)),
        "gate_scale": ("float32", (77,)),
        "up": ("int8", (77, 45)),
        "up_scale": ("float32", (77,)),
        "down": ("int8", (45, 77)),
        "down_scale": ("float32", (45,)),
    }
    int4 = kt_kernels.quantize_expert(*layer.matrices(0), "AMXINT4_SFT")
    assert {name: (array.dtype.name, array.shape) for name, array in int4.items()} == {
        "gate": ("uint8", (77, 23)),
        "gate_scale": ("uint16", (77, 2)),
        "up": ("uint8", (77, 23)),
        "up_scale": ("uint16", (77, 2)),
        "down": ("uint8", (45, 39)),
        "down_scale": ("uint16", (45, 3)),
    }


def test_int8_rounds_to_nearest_by_row() -> None:
    layer = random_layer(1, 64, 32)
    arrays = kt_kernels.quantize_expert(*layer.matrices(0), "AMXINT8_SFT")
    gate = layer.gate[0].double().numpy()
    scale = np.abs(gate).max(1) / 127
    assert np.allclose(arrays["gate_scale"], scale, rtol=1e-6)
    assert np.abs(arrays["gate"] * arrays["gate_scale"][:, None].astype(np.float64) - gate).max() <= scale.max() * 0.501
    assert np.abs(arrays["gate"].astype(int)).max() == 127


def test_int4_beats_rounding_to_the_largest_value() -> None:
    """The scale search: at least a tenth better than scale = largest / 7 in each group."""
    layer = random_layer(1, 2048, 64)
    found = dequantized(layer, "AMXINT4_SFT").gate[0]
    gate = layer.gate[0].double()
    groups = gate.reshape(64, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale).reshape(gate.shape)
    assert relative_l2(found, gate) < 0.9 * relative_l2(plain, gate)
    assert relative_l2(found, gate) < 0.085


def test_int4_scales_are_as_good_as_a_search_without_end() -> None:
    """Against every size from 4.5 to 10 in steps of 1/50 and both signs, in float64."""
    layer = random_layer(1, 1024, 64)
    gate = layer.gate[0].double()
    groups = gate.reshape(-1, 32)
    largest = groups.abs().amax(1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    for size in torch.arange(4.5, 10, 0.02).tolist():
        for factor in (size / largest, -size / largest):
            q = (groups * factor).round().clamp(-8, 7)
            scale = (groups * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True)
            best = torch.minimum(best, (scale * q - groups).square().sum(1, keepdim=True))
    found = (dequantized(layer, "AMXINT4_SFT").gate[0] - gate).square().sum()
    assert found <= best.sum() * 1.005


Bits = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""bfloat16 values, or integers that become some."""


def bf16(bits: Bits) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def finite_bits(rng: np.random.Generator, shape: tuple[int, int]) -> Bits:
    """Any bf16 but NaN and infinity: denormals, both zeros, the largest of all."""
    bits = rng.integers(0, 1 << 16, shape)
    return np.where(bits & 0x7F80 == 0x7F80, bits & 0x80FF, bits)


def halves(rng: np.random.Generator, shape: tuple[int, int]) -> Bits:
    """Multiples of 1/2, so that many a value lies in the middle between two."""
    values = torch.from_numpy(rng.integers(-15, 16, shape)).float().mul(0.5).bfloat16()
    bits: Bits = values.view(torch.int16).numpy().view(np.uint16)
    return bits


def with_signs(rng: np.random.Generator, bits: Bits) -> Bits:
    signs: Bits = rng.integers(0, 2, bits.shape) << 15
    return bits | signs


HARD: dict[str, Callable[[np.random.Generator, tuple[int, int]], Bits]] = {
    "any": finite_bits,
    "denormal": lambda rng, shape: with_signs(rng, rng.integers(0, 0x80, shape)),
    "tiny": lambda rng, shape: with_signs(rng, rng.integers(0, 0x900, shape)),
    "halves": halves,
    "sparse": lambda rng, shape: np.where(rng.random(shape) < 0.95, 0, rng.integers(0, 0x7F80, shape)),
    "one magnitude": lambda rng, shape: with_signs(rng, np.full(shape, rng.integers(0, 0x7F80))),
    "zeros": lambda rng, shape: with_signs(rng, np.zeros(shape, np.int64)),
}


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("method", QUANTIZED)
def test_every_instruction_set_quantizes_to_the_same_bits(isa: str, method: str, hard: str) -> None:
    """Odd tails of every length, so that no lane's work depends on its neighbours."""
    rng = np.random.default_rng(5)
    for inputs in [*range(1, 70), 255, 256, 257, 300, 519]:
        gate, up = (bf16(HARD[hard](rng, (3, inputs))) for _ in range(2))
        down = bf16(HARD[hard](rng, (inputs, 3)))
        arrays = kt_kernels.quantize_expert(gate, up, down, method, isa=isa)
        expected = kt_kernels.quantize_expert(gate, up, down, method, isa="reference")
        for name in expected:
            assert arrays[name].tobytes() == expected[name].tobytes(), f"{name}, {inputs} inputs"
        for name in ("gate_scale", "up_scale", "down_scale"):
            scale = bf16(arrays[name]).float() if method == "AMXINT4_SFT" else torch.from_numpy(arrays[name])
            assert scale.isfinite().all(), f"{name}, {inputs} inputs"


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("inputs", [1, 31, 64, 77, 300])
def test_every_instruction_set_packs_the_same_bytes_of_hard_values(isa: str, method: str, inputs: int) -> None:
    rng = np.random.default_rng(6)
    for make in HARD.values():
        gate, up = (bf16(make(rng, (37, inputs)))[None] for _ in range(2))
        layer = Layer(gate, up, bf16(make(rng, (inputs, 37)))[None])
        own, reference = (build(layer, name, method, nodes=2).packed_shards() for name in (isa, "reference"))
        assert all(np.array_equal(one, other) for one, other in zip(own, reference, strict=True))


@pytest.mark.parametrize("method", QUANTIZED)
def test_what_is_as_good_as_zero_becomes_zero(method: str) -> None:
    """Denormals: the reciprocal of their scale is not finite."""
    tiny = bf16(np.full((16, 64), 0x0003))
    arrays = kt_kernels.quantize_expert(tiny, tiny, tiny.t().contiguous(), method)
    assert (arrays["gate"] == (0x88 if method == "AMXINT4_SFT" else 0)).all()


@pytest.mark.parametrize("place", [0, 1, 31, 32, 63, 64, 255, 256, 299])
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(isa: str, method: str, place: int) -> None:
    gate = torch.ones(2, 300).bfloat16()
    gate[1, place] = -torch.inf
    with pytest.raises(ValueError, match="weights: hold NaN or infinity"):
        kt_kernels.quantize_expert(gate, gate, gate.t().contiguous(), method, isa=isa)


@pytest.mark.parametrize("method", QUANTIZED)
def test_zeros_and_single_values_survive(method: str) -> None:
    gate = torch.zeros(32, 64).bfloat16()
    gate[3, 7] = -2.5
    arrays = kt_kernels.quantize_expert(gate, gate, gate.t().contiguous(), method)
    layer = Layer(gate[None], gate[None], gate.t().contiguous()[None])
    back = dequantized(layer, method)
    assert torch.allclose(back.gate[0], gate.double(), rtol=0.01), arrays["gate"][3]


@pytest.mark.parametrize("method", METHODS)
def test_error_of_a_whole_layer_on_gaussian_weights(method: str, isa: str) -> None:
    if isa in ("reference", "amx_model"):
        tokens, hidden, intermediate = 4, 1024, 704  # the slow ones on a quarter of the shape
    else:
        tokens, hidden, intermediate = 16, 2048, 1408
    layer = random_layer(1, hidden, intermediate)
    batch = random_batch(layer, tokens, 1)
    out = forward(build(layer, isa, method), batch)
    expected = expected_forward(layer, batch, "AMXBF16_SFT", isa).out
    assert relative_l2(out, expected) <= MOST_ERROR[method]


def test_bits_a_weight() -> None:
    layer = random_layer(2, 512, 512)
    weights = 3 * 2 * 512 * 512
    bits = {method: build(layer, "auto", method).packed_bytes * 8 / weights for method in METHODS}
    assert bits["AMXBF16_SFT"] == 16.0
    assert bits["AMXINT8_SFT"] < 8.2
    assert bits["AMXINT4_SFT"] < 4.6


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    layer = random_layer(1, 64, 32)
    layer.up[0, 3, 5] = bad
    with pytest.raises(ValueError, match="weights: hold NaN or infinity, expected finite values"):
        kt_kernels.quantize_expert(*layer.matrices(0), method)
    with pytest.raises(ValueError, match="weights: hold NaN or infinity, expected finite values"):
        build(layer, "auto", method)


def loadable(method: str) -> tuple[kt_kernels.MoE, dict[str, Any]]:
    layer = random_layer(1, 64, 32)
    return build(layer, "auto", method), kt_kernels.quantize_expert(*layer.matrices(0), method)


@pytest.mark.parametrize("method", QUANTIZED)
def test_scales_that_are_not_finite_are_refused(method: str) -> None:
    moe, arrays = loadable(method)
    arrays["up_scale"].reshape(-1)[2] = 0x7FC0 if method == "AMXINT4_SFT" else np.nan
    with pytest.raises(ValueError, match="up_scale: value 2 is NaN or infinite, expected finite scales"):
        moe.load_quantized_expert(0, arrays)


def test_other_arrays_are_refused() -> None:
    moe, arrays = loadable("AMXINT8_SFT")
    with pytest.raises(ValueError, match="arrays: 'down_scale' is missing, expected gate, gate_scale"):
        moe.load_quantized_expert(0, {name: array for name, array in arrays.items() if name != "down_scale"})
    with pytest.raises(ValueError, match=re.escape("gate: expected shape (32, 64), got (64, 32)")):
        moe.load_quantized_expert(0, arrays | {"gate": arrays["down"]})
    with pytest.raises(TypeError, match="gate: expected dtype int8, got uint8"):
        moe.load_quantized_expert(0, arrays | {"gate": arrays["gate"].view(np.uint8)})
    with pytest.raises(ValueError, match="arrays: AMXBF16_SFT takes bf16 weights by load_expert"):
        build(random_layer(1, 64, 32), "auto").load_quantized_expert(0, arrays)
    with pytest.raises(ValueError, match="method: AMXBF16_SFT keeps bf16, expected AMXINT8_SFT or AMXINT4_SFT"):
        kt_kernels.quantize_expert(*random_layer(1, 64, 32).matrices(0), "AMXBF16_SFT")


def test_int4_scales_may_be_a_bfloat16_tensor() -> None:
    moe, arrays = loadable("AMXINT4_SFT")
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items() if "scale" not in name}
    for name in ("gate_scale", "up_scale", "down_scale"):
        tensors[name] = torch.from_numpy(arrays[name].view(np.int16)).view(torch.bfloat16)
    layer = random_layer(1, 64, 32)
    batch = random_batch(layer, 3, 1)
    expected = forward(moe, batch)
    moe.load_quantized_expert(0, tensors)
    assert torch.equal(forward(moe, batch), expected)
