"""What the kernels are held against: MoE with LoRA in float64, and how far rounding may take a result.

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from rounding import EPS, Expert, Projection, Rules, largest_ratio, widening_variance

import kt_kernels

METHODS = ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT")
ISAS = (*kt_kernels.isas(), "amx_model")  # that run here; the tile model is for tests only
GROUP = 32
MOST_POOLS = 4  # that any test splits a layer into


@dataclass(frozen=True)
class LoRA:
    """One adapter as the caller has it; a projection may be absent."""

    gate: tuple[torch.Tensor, torch.Tensor] | None
    up: tuple[torch.Tensor, torch.Tensor] | None
    down: tuple[torch.Tensor, torch.Tensor] | None
    scale: float = 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that are there."""
        return [side for pair in (self.gate, self.up, self.down) if pair for side in pair]

    def packed(self) -> kt_kernels.Adapter:
        pairs = [pair or (None, None) for pair in (self.gate, self.up, self.down)]
        return kt_kernels.Adapter(*(side for pair in pairs for side in pair), scale=self.scale)

    def rounded(self) -> LoRA:
        """As bfloat16 tensors."""
        gate, up, down = (pair and (pair[0].bfloat16(), pair[1].bfloat16()) for pair in (self.gate, self.up, self.down))
        return LoRA(gate, up, down, self.scale)


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

    return LoRA(
        gate=pair(ranks[0], intermediate, hidden),
        up=pair(ranks[1], intermediate, hidden),
        down=pair(ranks[2], hidden, intermediate),
        scale=scale,
    )


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


@dataclass
class Weights(Layer):
    """A layer as its packed weights stand for it."""

    widening: dict[str, torch.Tensor] = field(default_factory=dict)  # int4 only: variances, see rounding.py

    def expert(self, index: int, slot: int) -> Expert:
        lora = self.adapters[slot] if slot >= 0 else None
        return Expert(*(self._projection(name, index, lora) for name in ("gate", "up", "down")))

    def _projection(self, name: str, expert: int, lora: LoRA | None) -> Projection:
        pair = getattr(lora, name) if lora else None
        a, b = (lora.scale * pair[0][expert].double(), pair[1][expert].double()) if lora and pair else (None, None)
        widening = self.widening[name][expert] if self.widening else None
        return Projection(getattr(self, name)[expert].double(), a, b, widening)


def dequantized(layer: Layer, method: str) -> Weights:
    """What the packed weights stand for."""
    if method == "AMXBF16_SFT":
        return Weights(layer.gate, layer.up, layer.down, layer.adapters)
    experts = [kt_kernels.quantize_expert(*layer.matrices(e), method) for e in range(layer.sizes[0])]
    _, hidden, intermediate = layer.sizes
    inputs = {"gate": hidden, "up": hidden, "down": intermediate}

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([_dequantize(arrays[name], arrays[f"{name}_scale"], inputs[name]) for arrays in experts])

    def widening(name: str) -> torch.Tensor:
        return torch.stack([widening_variance(_scales(arrays[f"{name}_scale"]), inputs[name]) for arrays in experts])

    steps = {name: widening(name) for name in inputs} if method == "AMXINT4_SFT" else {}
    return Weights(stacked("gate"), stacked("up"), stacked("down"), layer.adapters, steps)


def _scales(as_bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(as_bits.view(np.int16)).view(torch.bfloat16).double()


def _dequantize(values: np.ndarray, scales: np.ndarray, inputs: int) -> torch.Tensor:
    if values.dtype == np.int8:
        return torch.from_numpy(values.astype(np.float64) * scales.astype(np.float64)[:, None])
    nibbles = np.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)[:, :inputs].astype(np.float64) - 8
    return torch.from_numpy(nibbles) * _scales(scales).repeat_interleave(GROUP, 1)[:, :inputs]


@dataclass
class Expected:
    out: torch.Tensor
    noise: torch.Tensor  # (T, H): the standard deviation that the kernels' roundings give each value


def expected_forward(layer: Layer, batch: Batch, method: str, isa: str) -> Expected:
    return expected_of(dequantized(layer, method), batch, Rules.of(method, isa))


def expected_of(weights: Weights, batch: Batch, rules: Rules) -> Expected:
    return expected_of_all(weights, batch, {rules})[rules]


def expected_of_all(weights: Weights, batch: Batch, all_rules: set[Rules]) -> dict[Rules, Expected]:
    """An expert counts once a token, with the sum of its weights: a pair that comes twice is rounded alike twice."""
    size = (len(batch.ids), weights.sizes[1])
    sums = {rules: [torch.zeros(size, dtype=torch.float64) for _ in range(3)] for rules in all_rules}
    slots = batch.slots if batch.slots is not None else torch.full((len(batch.ids),), -1)
    for index in batch.ids[batch.ids >= 0].unique().tolist():
        hits = batch.ids == index
        share = (batch.weights.double() * hits).sum(-1, keepdim=True)
        for slot in slots[hits.any(-1)].unique().tolist():
            token = (hits.any(-1) & (slots == slot)).nonzero()[:, 0]
            x, rows, expert = batch.x[token].double(), int(hits.sum()), weights.expert(index, slot)
            shares = (batch.weights[token].double() * hits[token]).pow(2).sum(-1, keepdim=True)
            acting = {rules: rules.acting(rows) for rules in sums}
            results = {rules: expert.forward(x, rules, rows) for rules in set(acting.values())}
            for rules, (out, variance, squares) in sums.items():
                result = results[acting[rules]]
                out.index_add_(0, token, share[token] * result.y_RH)
                variance.index_add_(0, token, share[token].pow(2) * result.variance_RH)
                squares.index_add_(0, token, shares * result.square_RH)
    additions = MOST_POOLS * batch.ids.shape[1]  # of the weighted sum, each of which rounds what there is so far
    return {
        rules: Expected(out, (variance + EPS**2 * additions * squares).sqrt())
        for rules, (out, variance, squares) in sums.items()
    }


def assert_close(out: torch.Tensor, expected: Expected, what: str, deviations: float = 8.0) -> None:
    """Every value within `deviations` standard deviations of rounding; the worst one is named."""
    if out.numel() == 0:
        return
    error = (out.double() - expected.out).abs()
    if out.dtype == torch.bfloat16:
        error = (error - expected.out.abs() * 2.0**-8).clamp(min=0)
    ratio, token, column = largest_ratio(error, expected.noise)
    if ratio <= deviations:
        return
    raise AssertionError(
        f"{what}: worst at token {token}, column {column}: got {out[token, column]:.6g}, expected "
        f"{expected.out[token, column]:.6g}, {ratio:.3g} times rounding's {expected.noise[token, column]:.3g}, "
        f"at most {deviations:g}; relative L2 {relative_l2(out, expected.out):.3g}"
    )


def relative_l2(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def check(layer: Layer, moe: kt_kernels.MoE, batch: Batch, what: str = "") -> torch.Tensor:
    out = forward(moe, batch)
    assert_close(out, expected_forward(layer, batch, moe.method, moe.isa), f"{moe.isa} {moe.method} {what}")
    return out
