"""The truth that the kernels are held against: MoE with LoRA in float64, and how far rounding may take a result.

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import kt_kernels

METHODS = ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT")
BF16_ROWS = {
    "amx",
    "amx_model",
    "avx512_bf16",
}  # these keep activations in bf16 for bf16 weights, the others in float32
SEGMENT = 1024  # most inputs that share one activation scale
GROUP = 32


@dataclass(frozen=True)
class LoRA:
    """One adapter as the caller has it; a projection may be absent."""

    gate: tuple[torch.Tensor, torch.Tensor] | None
    up: tuple[torch.Tensor, torch.Tensor] | None
    down: tuple[torch.Tensor, torch.Tensor] | None
    scale: float = 1.0

    def packed(self) -> kt_kernels.Adapter:
        pairs = [pair or (None, None) for pair in (self.gate, self.up, self.down)]
        return kt_kernels.Adapter(*(side for pair in pairs for side in pair), scale=self.scale)

    def delta(self, pair: tuple[torch.Tensor, torch.Tensor] | None, expert: int) -> torch.Tensor | float:
        if pair is None:
            return 0.0
        a, b = pair
        return self.scale * (b[expert].double() @ a[expert].double())


@dataclass
class Layer:
    """Weights of one layer and its adapters by slot."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    adapters: dict[int, LoRA] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, int]:
        experts, intermediate, hidden = self.gate.shape
        return experts, hidden, intermediate

    def matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate[expert], self.up[expert], self.down[expert]


@dataclass
class Batch:
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor | None = None


def random_layer(experts: int, hidden: int, intermediate: int, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, inputs: int) -> torch.Tensor:
        return (torch.randn(experts, rows, inputs, generator=generator) / math.sqrt(inputs)).bfloat16()

    return Layer(matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))


def random_lora(
    layer: Layer,
    rank: int | tuple[int, int, int],
    scale: float = 1.0,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> LoRA:
    """An adapter whose delta is about as large as the base weights, so that no error in it can hide."""
    experts, hidden, intermediate = layer.sizes
    generator = torch.Generator().manual_seed(seed)
    ranks = (rank, rank, rank) if isinstance(rank, int) else rank

    def pair(rank: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(experts, rank, inputs, generator=generator) / math.sqrt(inputs)
        b = torch.randn(experts, outputs, rank, generator=generator) / math.sqrt(max(rank, 1)) / scale
        return a.to(dtype), b.to(dtype)

    sides = [(ranks[0], intermediate, hidden), (ranks[1], intermediate, hidden), (ranks[2], hidden, intermediate)]
    return LoRA(*(pair(*side) for side in sides), scale=scale)


def random_batch(layer: Layer, tokens: int, top_k: int, slots: tuple[int, ...] | None = None, seed: int = 2) -> Batch:
    """Distinct experts a token; `slots` are drawn from evenly, None for no slots at all."""
    experts, hidden, _ = layer.sizes
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    drawn = None
    if slots is not None:
        drawn = torch.tensor(slots)[torch.randint(len(slots), (tokens,), generator=generator)]
    return Batch(
        torch.randn(tokens, hidden, generator=generator).bfloat16(),
        scores.topk(top_k, -1).indices,
        torch.rand(tokens, top_k, generator=generator) + 0.1,
        drawn,
    )


def build(layer: Layer, isa: str, method: str = METHODS[0], threads: int = 2, nodes: int = 1) -> kt_kernels.MoE:
    experts, hidden, intermediate = layer.sizes
    pool = kt_kernels.ThreadPool(threads, nodes=nodes)
    moe = kt_kernels.MoE(
        num_experts=experts, hidden_size=hidden, intermediate_size=intermediate, method=method, isa=isa, pool=pool
    )
    for expert in range(experts):
        moe.load_expert(expert, *layer.matrices(expert))
    for slot, lora in layer.adapters.items():
        moe.set_adapter(slot, lora.packed())
    return moe


def forward(moe: kt_kernels.MoE, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(batch.x.shape, float("nan"), dtype=dtype)
    moe.forward(batch.x, batch.ids, batch.weights, batch.slots, out)
    return out


def dequantized(layer: Layer, method: str) -> Layer:
    """What the packed weights stand for."""
    if method == "AMXBF16_SFT":
        return layer
    experts = [kt_kernels.quantize_expert(*layer.matrices(e), method) for e in range(layer.sizes[0])]

    def stacked(name: str, inputs: int) -> torch.Tensor:
        return torch.stack([_dequantize(arrays[name], arrays[f"{name}_scale"], inputs) for arrays in experts])

    _, hidden, intermediate = layer.sizes
    return Layer(stacked("gate", hidden), stacked("up", hidden), stacked("down", intermediate), layer.adapters)


def _dequantize(values: np.ndarray, scales: np.ndarray, inputs: int) -> torch.Tensor:
    if values.dtype == np.int8:
        return torch.from_numpy(values.astype(np.float64) * scales.astype(np.float64)[:, None])
    nibbles = np.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)[:, :inputs].astype(np.float64) - 8
    as_float = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16).double()
    return torch.from_numpy(nibbles) * as_float.repeat_interleave(GROUP, 1)[:, :inputs]


@dataclass
class Truth:
    out: torch.Tensor
    noise: torch.Tensor  # (T,): the standard deviation that rounding gives each value of a token's result


def true_forward(layer: Layer, batch: Batch, method: str, isa: str) -> Truth:
    weights = dequantized(layer, method)
    experts, hidden, intermediate = layer.sizes
    tokens = batch.ids.shape[0]
    out = torch.zeros(tokens, hidden, dtype=torch.float64)
    variance = torch.zeros(tokens, dtype=torch.float64)
    slots = batch.slots if batch.slots is not None else torch.full((tokens,), -1)
    for expert in range(experts):
        for slot in slots.unique().tolist():
            token, k = ((batch.ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
            if len(token) == 0:
                continue
            gate, up, down = (matrix.double() for matrix in weights.matrices(expert))
            if slot >= 0:
                lora = layer.adapters[slot]
                gate, up, down = (
                    gate + lora.delta(lora.gate, expert),
                    up + lora.delta(lora.up, expert),
                    down + lora.delta(lora.down, expert),
                )
            x = batch.x[token].double()
            h = F.silu(x @ gate.T) * (x @ up.T)
            y = batch.weights[token, k, None].double() * (h @ down.T)
            out.index_add_(0, token, y)
            relative = 2 * _rounding(x, method, isa, is_bf16=True) ** 2 + _rounding(h, method, isa) ** 2
            relative += _accumulation(hidden, intermediate) ** 2 + _weights_noise(method, isa) ** 2
            scale = h.norm(dim=-1) * down.norm() / math.sqrt(h.shape[-1] * down.shape[0])
            size = torch.maximum(y.pow(2).mean(-1).sqrt(), scale * batch.weights[token, k].double())
            variance.index_add_(0, token, relative * size**2)
    return Truth(out, variance.sqrt())


def _rounding(values: torch.Tensor, method: str, isa: str, is_bf16: bool = False) -> torch.Tensor:
    """Relative noise of storing activations as the kernels do."""
    if method == "AMXBF16_SFT":
        exact = isa not in BF16_ROWS or is_bf16
        return torch.full(values.shape[:1], 0.0 if exact else 2.0**-9, dtype=torch.float64)
    noise = torch.zeros(values.shape[0], dtype=torch.float64)
    for segment in values.split(SEGMENT, -1):
        noise += segment.abs().amax(-1).div(127).pow(2) / 12 * segment.shape[-1]
    return (noise / values.pow(2).sum(-1).clamp(min=1e-300)).sqrt()


def _accumulation(hidden: int, intermediate: int) -> float:
    return 2.0**-24 * math.sqrt(hidden + intermediate) * 4


def _weights_noise(method: str, isa: str) -> float:
    """bf16 rounding of the low-rank product z; and the widening of int4 weights to int8 that AMX does."""
    widened = 0.02 if method == "AMXINT4_SFT" and isa in ("amx", "amx_model") else 0.0
    return math.hypot(2.0**-8 if isa in BF16_ROWS else 0.0, widened)


def assert_close(out: torch.Tensor, truth: Truth, what: str, deviations: float = 8.0) -> None:
    """Every value within `deviations` standard deviations of rounding; the worst one is named."""
    error = (out.double() - truth.out).abs()
    if out.dtype == torch.bfloat16:
        error = (error - truth.out.abs() * 2.0**-8).clamp(min=0)
    allowed = deviations * truth.noise[:, None] + 1e-30
    ratio = torch.nan_to_num(error / allowed, nan=math.inf)
    if ratio.numel() == 0 or ratio.max() <= 1:
        return
    token, column = divmod(int(ratio.argmax()), ratio.shape[1])
    raise AssertionError(
        f"{what}: worst at token {token}, column {column}: got {out[token, column]:.6g}, "
        f"true {truth.out[token, column]:.6g}, allowed error {allowed[token, 0]:.3g}; "
        f"relative L2 {relative_l2(out, truth.out):.3g}"
    )


def relative_l2(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def check(layer: Layer, moe: kt_kernels.MoE, batch: Batch, what: str = "") -> torch.Tensor:
    out = forward(moe, batch)
    assert_close(out, true_forward(layer, batch, moe.method, moe.isa), f"{moe.isa} {moe.method} {what}")
    return out
