"""A batch between the products of resident experts, its adapters' factors, and what float32 makes of both.

Shapes: T tokens, K top-k, P = T·K choices, N resident experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

K, EXPERTS, HIDDEN, INNER, SLOTS = 3, 5, 64, 48, 3


def random_pools(rank: int, device: str = "cpu") -> Any:
    """Two adapters, in slots 0 and 2, in pools of this rank; slot 2's adapter leaves the last rank empty."""
    from kt_sglang.experts.resident_adapters import ResidentAdapters

    dice = torch.Generator().manual_seed(rank)
    pools = ResidentAdapters(SLOTS, EXPERTS, rank, HIDDEN, INNER, torch.device(device))
    shapes = (rank, HIDDEN), (INNER, rank), (rank, HIDDEN), (INNER, rank), (rank, INNER), (HIDDEN, rank)
    for slot in (0, 2):
        factors = [(torch.randn(EXPERTS, *shape, generator=dice) / 4).bfloat16() for shape in shapes]
        if slot == 2 and rank > 1:
            for b in factors[1::2]:
                b[..., -1] = 0
        pools.fill(slot, tuple(factors))
    return pools


@dataclass
class Batch:
    """What SGLang's kernels pass to the hooks."""

    x_TH: torch.Tensor
    inner_PI: torch.Tensor
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    slots_T: torch.Tensor
    before: tuple[torch.Tensor, torch.Tensor]
    """gate and up (T, K, 2I), down (T, K, H)."""

    @classmethod
    def random(cls, tokens: int, chosen: str, device: str = "cpu") -> Batch:
        """chosen: 'mixed' has experts that are not resident, both adapters and the base."""
        dice = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=dice).bfloat16().to(device)

        ids = torch.stack([torch.randperm(EXPERTS + 3, generator=dice)[:K] for _ in range(tokens)])
        ids = torch.where(ids < EXPERTS, ids, -1)
        ids[0, 0] = 2
        slots = torch.tensor([0, -1, 2, 2, 0, -1])[torch.arange(tokens) % 6]
        if chosen == "one slot":
            slots[:] = 2
        if chosen == "base only":
            slots[:] = -1
        if chosen == "nobody's":
            ids[:] = -1
        if chosen == "one expert":
            ids[:, 0], ids[:, 1:] = 3, -1
        return cls(
            draw(tokens, HIDDEN),
            draw(tokens * K, INNER),
            torch.rand(tokens, K, generator=dice).to(device),
            ids.int().to(device),
            slots.int().to(device),
            (draw(tokens, K, 2 * INNER), draw(tokens, K, HIDDEN)),
        )

    @property
    def adapted_TK(self) -> torch.Tensor:
        """The choices that an adapter changes."""
        return (self.ids_TK >= 0) & (self.slots_T >= 0).unsqueeze(-1)

    def after(self, hooks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """gate and up, and down, after both hooks."""
        gate_up, down = (each.clone() for each in self.before)
        hooks.after_gate_up(self.x_TH, gate_up, self.weights_TK, self.ids_TK)
        hooks.after_down(self.inner_PI, down, self.weights_TK, self.ids_TK)
        return gate_up, down


def in_float32(pools: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the hooks should make of the batch, in float32."""
    gate_up, down = (each.float().cpu() for each in batch.before)
    inner_PI, rank = batch.inner_PI.float().cpu().view(*gate_up.shape[:2], -1), pools.rank
    gate_up_a, gate_up_b, down_a, down_b = (pool.float().cpu() for pool in pools.pools)
    for token, choice in batch.adapted_TK.nonzero().tolist():
        group = int(batch.slots_T[token]) * pools.experts + int(batch.ids_TK[token, choice])
        low = gate_up_a[group] @ batch.x_TH[token].float().cpu()
        gate_up[token, choice] += torch.cat([gate_up_b[group, 0] @ low[:rank], gate_up_b[group, 1] @ low[rank:]])
        changed = down_b[group] @ (down_a[group] @ inner_PI[token, choice])
        down[token, choice] += batch.weights_TK[token, choice].cpu() * changed
    return gate_up, down
