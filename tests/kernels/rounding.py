"""How far rounding may take a kernel's result: each stored value's error, carried to the result to first order.

A value stored in steps of s is off by an error that is spread evenly over ±s/2: variance s²/12. Through a product with
weights W a variance v becomes v @ (W²)ᵀ, through h = silu(g) u it is multiplied by the squared derivatives. Nothing
here is measured on the kernels; what they store, and in which format, is written in kernels/gemm.h.

Shapes: R rows of one expert and adapter, H hidden, I intermediate, r rank, N outputs and K inputs of any matrix.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

BF16_ROWS = {"amx", "amx_model", "avx512_bf16"}  # store activations in bf16 where weights are; the others in float32
# From so many rows of an expert on, int4 weights become int8 with one scale an output and segment.
WIDENS_FROM = {"amx": 5, "amx_model": 1, "avx512": 32, "avx512_bf16": 32}
SEGMENT = 1024  # most inputs that share one activation scale
STEP = 64  # segments begin at multiples of it
EPS = 2.0**-24  # relative error of one float32 operation
SILU_ERROR = 1e-6  # relative, of the kernels' exp: test_silu_is_exact_over_its_whole_range holds them to it


def segments(inputs: int) -> list[slice]:
    """The parts of a row that have a scale each, as row_segment in kernels/pack.cpp cuts them."""
    padded = -(-inputs // STEP)
    count = -(-padded * STEP // SEGMENT)
    edges = [padded * i // count * STEP for i in range(count + 1)]
    return [slice(begin, min(end, inputs)) for begin, end in itertools.pairwise(edges)]


def int8_variance(values_RK: torch.Tensor) -> torch.Tensor:
    """Of activations stored as int8: a segment's largest value is 127 steps."""
    variance = torch.empty_like(values_RK)
    for part in segments(values_RK.shape[1]):
        variance[:, part] = (values_RK[:, part].abs().amax(-1, keepdim=True) / 127).pow(2) / 12
    return variance


def bf16_variance(values: torch.Tensor) -> torch.Tensor:
    """Of values stored with 8 significant bits."""
    exponent = values.abs().clamp(min=1e-30).log2().floor()
    return torch.exp2(2 * (exponent - 7)) / 12


def widening_variance(scales_NG: torch.Tensor, inputs: int) -> torch.Tensor:
    """(N, K): of int4 weights (up to 8 times their group's scale) stored again as int8 with one scale a segment."""
    per_input = scales_NG.abs().repeat_interleave(32, 1)[:, :inputs]
    variance = torch.empty_like(per_input)
    for part in segments(inputs):
        variance[:, part] = (per_input[:, part].amax(-1, keepdim=True) * 8 / 127).pow(2) / 12
    return variance


@dataclass(frozen=True)
class Rules:
    """What one method on one instruction set rounds."""

    quantized: bool
    bf16_rows: bool
    widens_from: float  # rows of an expert

    @staticmethod
    def of(method: str, isa: str) -> Rules:
        widens_from = WIDENS_FROM.get(isa, math.inf) if method == "AMXINT4_SFT" else math.inf
        return Rules(method != "AMXBF16_SFT", isa in BF16_ROWS, widens_from)

    def acting(self, rows: int) -> Rules:
        """On an expert of so many rows: several rules are one where they differ in what does not happen there."""
        return replace(self, widens_from=0 if rows >= self.widens_from else math.inf)


@dataclass(frozen=True)
class Projection:
    """One matrix of one expert, with what an adapter adds to it."""

    base_NK: torch.Tensor
    a_rK: torch.Tensor | None  # times the adapter's scale
    b_Nr: torch.Tensor | None
    widening_NK: torch.Tensor | None  # what widening adds to the weights' variance; None where they are not int4

    @cached_property
    def delta_NK(self) -> torch.Tensor:
        if self.a_rK is None or self.b_Nr is None:
            return torch.zeros_like(self.base_NK)
        return self.b_Nr @ self.a_rK

    @cached_property
    def whole_NK(self) -> torch.Tensor:
        return self.base_NK + self.delta_NK

    @cached_property
    def base_squares_NK(self) -> torch.Tensor:
        return self.base_NK.pow(2)

    @cached_property
    def whole_squares_NK(self) -> torch.Tensor:
        return self.whole_NK.pow(2)

    def own_variance(self, x_RK: torch.Tensor, rules: Rules, widens: bool) -> torch.Tensor:
        """From sums in float32, weights that are widened, and z = x Aᵀ stored between A and B."""
        squares = x_RK.pow(2)
        variance = _sum_variance(squares, self.base_squares_NK) + EPS**2 * (x_RK @ self.whole_NK.T).pow(2)
        if widens and self.widening_NK is not None:
            variance += squares @ self.widening_NK.T
        if self.a_rK is None or self.b_Nr is None or self.a_rK.shape[0] == 0:
            return variance
        z_Rr = x_RK @ self.a_rK.T
        a_squares_rK, b_squares_Nr = self.a_rK.pow(2), self.b_Nr.pow(2)
        z_variance = _sum_variance(squares, a_squares_rK)
        if rules.bf16_rows:  # each pool stores its part of z, which is of the size that random signs give it
            z_variance = z_variance + bf16_variance(torch.maximum(z_Rr.abs(), (squares @ a_squares_rK.T).sqrt()))
        return variance + z_variance @ b_squares_Nr.T + _sum_variance(z_Rr.pow(2), b_squares_Nr)


def _sum_variance(squares_RK: torch.Tensor, weight_squares_NK: torch.Tensor) -> torch.Tensor:
    """K products added one by one: each addition rounds a partial sum, and those are random walks."""
    return EPS**2 * weight_squares_NK.shape[1] * (squares_RK @ weight_squares_NK.T)


@dataclass(frozen=True)
class Result:
    y_RH: torch.Tensor
    variance_RH: torch.Tensor
    square_RH: torch.Tensor  # what y^2 is when signs are random: so large are the parts that pools give to the sum


@dataclass(frozen=True)
class Expert:
    gate: Projection
    up: Projection
    down: Projection

    def forward(self, x_RH: torch.Tensor, rules: Rules, all_rows: int) -> Result:
        """`all_rows` of the expert, those of other adapters too."""
        widens = all_rows >= rules.widens_from
        gate_RI, up_RI = x_RH @ self.gate.whole_NK.T, x_RH @ self.up.whole_NK.T
        sigmoid = torch.sigmoid(gate_RI)
        silu = gate_RI * sigmoid
        h_RI = silu * up_RI
        by_gate = up_RI * sigmoid * (1 + gate_RI * (1 - sigmoid))
        variance = (SILU_ERROR * h_RI).pow(2)
        variance += by_gate.pow(2) * self.gate.own_variance(x_RH, rules, widens)
        variance += silu.pow(2) * self.up.own_variance(x_RH, rules, widens)
        if rules.quantized:
            variance += self._input_variance(int8_variance(x_RH), by_gate, silu)
        squares_NI = self.down.whole_squares_NK
        down_variance = self.down.own_variance(h_RI, rules, widens) + variance @ squares_NI.T
        y_RH = h_RI @ self.down.whole_NK.T
        return Result(y_RH, down_variance + self._stored_variance(h_RI, rules), h_RI.pow(2) @ squares_NI.T)

    def _input_variance(self, x_RH: torch.Tensor, by_gate: torch.Tensor, by_up: torch.Tensor) -> torch.Tensor:
        """Gate and up read the same rounded x, so their errors add before they are squared. Adapters read x itself."""
        gate, up = self.gate.base_NK, self.up.base_NK
        both = 2 * by_gate * by_up * (x_RH @ (gate * up).T)
        return (
            by_gate.pow(2) * (x_RH @ self.gate.base_squares_NK.T)
            + by_up.pow(2) * (x_RH @ self.up.base_squares_NK.T)
            + both
        )

    def _stored_variance(self, h_RI: torch.Tensor, rules: Rules) -> torch.Tensor:
        """From h, stored as a row before down and its adapter read it; quantized weights read that row as int8."""
        stored = bf16_variance(h_RI) @ self.down.whole_squares_NK.T if rules.bf16_rows else torch.zeros(1)
        return stored + int8_variance(h_RI) @ self.down.base_squares_NK.T if rules.quantized else stored


def largest_ratio(error: torch.Tensor, noise: torch.Tensor) -> tuple[float, int, int]:
    """Of error to noise, with its row and column; NaN counts as infinite."""
    ratio = torch.nan_to_num(error.abs() / (noise + 1e-30), nan=math.inf)
    row, column = divmod(int(ratio.argmax()), ratio.shape[1])
    return float(ratio[row, column]), row, column
