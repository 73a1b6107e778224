"""Expert layers of DeepSeek-V2-Lite's shape by themselves, and a pool that stays awake between two of them as it does
between two layers of a captured step."""

from __future__ import annotations

import os

import torch

import kt_kernels
from kt_sglang.decode.captured import BETWEEN_LAYERS_US

H, I, E, K = 2048, 1408, 64, 6  # noqa: E741
BATCHES = (1, 4, 16, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pool_of(threads: int | None) -> kt_kernels.ThreadPool:
    """Of one thread for each core where no number is given."""
    pool = kt_kernels.ThreadPool(threads or len(os.sched_getaffinity(0)))
    pool.stay_awake(BETWEEN_LAYERS_US)
    return pool


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02).cpu()


def build(method: str, layers: int, pool: kt_kernels.ThreadPool) -> list[kt_kernels.MoE]:
    """All layers have the same content, each in memory of its own."""
    stacked = [random(E, *shape) for shape in ((I, H), (I, H), (H, I))]
    made = []
    for _ in range(layers):
        moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, method=method, pool=pool)
        for expert in range(E):
            moe.load_expert(expert, *(part[expert] for part in stacked))
        made.append(moe)
    return made


def add_adapters(layers: list[kt_kernels.MoE], adapters: int, rank: int) -> None:
    """One in each of the first slots, packed for each layer anew."""
    into, out_of = (E, rank, H), (E, I, rank)
    for slot in range(adapters):
        factors = [random(*shape) for shape in (into, out_of, into, out_of, (E, rank, I), (E, H, rank))]
        for moe in layers:
            moe.set_adapter(slot, kt_kernels.Adapter(*factors, scale=1.0))


def random_ids(tokens: int) -> torch.Tensor:
    """The experts of each token, all as likely."""
    return torch.rand(tokens, E).argsort()[:, :K].int()
