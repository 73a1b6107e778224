"""One layer of experts in kt_kernels, what float32 makes of it, and its adapters in pools as SGLang has them.

Shapes: T tokens, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import kt_kernels

EPS = 2.0**-8
SLOTS, RANK, POOL_RANK = 4, 3, 5
FORMATS = {"AMXBF16_SFT": "bf16", "AMXINT8_SFT": "int8", "AMXINT4_SFT": "int4"}


def draw(*shape: int, size: float, seed: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


@dataclass
class Case:
    """A layer's weights, as they are after quantizing, and its adapters in two of SGLang's slots, B scaled."""

    weights: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    moe: kt_kernels.MoE
    method: str
    factors: dict[int, tuple[torch.Tensor, ...]]

    @property
    def number_format(self) -> str:
        return FORMATS[self.method]

    def pools(self, in_pools: list[int], experts: int) -> tuple[torch.Tensor, ...]:
        """As lora.py describes them; `in_pools`: where this layer's experts stand among all."""
        (hidden, inner) = self.weights[0][2].shape
        a = torch.zeros(SLOTS, experts, 2 * POOL_RANK, hidden, dtype=torch.bfloat16)
        b = torch.zeros(SLOTS, experts, 2 * inner, POOL_RANK, dtype=torch.bfloat16)
        down_a = torch.zeros(SLOTS, experts, POOL_RANK, inner, dtype=torch.bfloat16)
        down_b = torch.zeros(SLOTS, experts, hidden, POOL_RANK, dtype=torch.bfloat16)
        for slot, (gate_a, gate_b, up_a, up_b, da, db) in self.factors.items():
            a[slot, in_pools, :RANK], a[slot, in_pools, POOL_RANK : POOL_RANK + RANK] = gate_a, up_a
            b[slot, in_pools, :inner, :RANK], b[slot, in_pools, inner:, :RANK] = gate_b, up_b
            down_a[slot, in_pools, :RANK], down_b[slot, in_pools, :, :RANK] = da, db
        return a, b, down_a, down_b

    def source(self, *, adapters: bool = False, in_pools: list[int] | None = None) -> Any:
        from kt_sglang.prompts.streamed import LayerSource

        source = LayerSource.of(0, self.moe, self.number_format)
        if adapters:
            places = in_pools or list(range(len(self.weights)))
            source.pools, source.in_pools = self.pools(places, max(places) + 1), in_pools or ()
        return source

    def on_cpu(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, slots: Any) -> torch.Tensor:
        out = torch.empty(x.shape)
        self.moe.forward(x, ids.int(), scores, None if slots is None else slots.int(), out)
        return out

    def in_float32(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, slots: Any) -> torch.Tensor:
        out = torch.zeros(x.shape)
        for token, row in enumerate(ids.tolist()):
            for choice, expert in enumerate(row):
                if expert < 0:
                    continue
                gate, up, down = (each.float() for each in self.weights[expert])
                slot = -1 if slots is None else int(slots[token])
                if slot in self.factors:
                    ga, gb, ua, ub, da, db = (each[expert].float() for each in self.factors[slot])
                    gate, up, down = gate + gb @ ga, up + ub @ ua, down + db @ da
                here = x[token].float()
                inner = torch.nn.functional.silu(gate @ here) * (up @ here)
                out[token] += scores[token, choice] * (down @ inner)
        return out


def case(method: str, hidden: int, inner: int, *, experts: int = 7, isa: str = "auto", nodes: int = 1) -> Case:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    originals = [
        tuple(draw(*shape, size=0.1, seed=3 * expert + at) for at, shape in enumerate(shapes))
        for expert in range(experts)
    ]
    moe = kt_kernels.MoE(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=inner,
        method=method,
        isa=isa,
        pool=kt_kernels.ThreadPool(nodes, nodes=nodes),
    )
    for expert, matrices in enumerate(originals):
        moe.load_expert(expert, *matrices)
    shapes_of_factors = ((RANK, hidden), (inner, RANK), (RANK, hidden), (inner, RANK), (RANK, inner), (hidden, RANK))
    factors = {
        slot: tuple(draw(experts, *shape, size=0.2, seed=100 * slot + at) for at, shape in enumerate(shapes_of_factors))
        for slot in (0, 2)
    }
    for slot, each in factors.items():
        moe.set_adapter(slot, kt_kernels.Adapter(*each))
    return Case([stored(method, matrices) for matrices in originals], moe, method, factors)


def stored(method: str, matrices: tuple[torch.Tensor, ...]) -> Any:
    """What the method keeps of bfloat16 matrices, in float32 rounded to bfloat16."""
    if method == "AMXBF16_SFT":
        return matrices
    arrays = kt_kernels.quantize_expert(matrices[0], matrices[1], matrices[2], method)
    found = []
    for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
        values, inputs = torch.from_numpy(arrays[name]), matrix.shape[1]
        if method == "AMXINT8_SFT":
            whole = values.float() * torch.from_numpy(arrays[f"{name}_scale"]).unsqueeze(1)
        else:
            scales = torch.from_numpy(arrays[f"{name}_scale"]).view(torch.bfloat16).float()
            numbers = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)[:, :inputs].float() - 8
            whole = numbers * scales.repeat_interleave(32, dim=1)[:, :inputs]
        found.append(whole.bfloat16())
    return tuple(found)


def batch(tokens: int, hidden: int, experts: int, top_k: int = 3) -> tuple[torch.Tensor, ...]:
    """x, ids (one of them nobody's), scores, slots: both adapters, an empty slot's number never, and the base."""
    dice = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=dice)[:top_k] for _ in range(tokens)])
    ids[0, 1] = -1
    x = torch.randn(tokens, hidden, generator=dice).bfloat16()
    slots = torch.tensor([0, -1, 2, 2, 0, -1])[torch.arange(tokens) % 6]
    return x, ids, torch.rand(tokens, top_k, generator=dice), slots


def close(one: torch.Tensor, other: torch.Tensor, limit: float) -> None:
    error = float((one.float() - other.float()).norm() / other.float().norm())
    assert error <= limit, f"relative L2 error {error:.2g}, expected at most {limit:.2g}"
