"""What is measured: model shapes, adapters, weights, batches, the float32 result, what a call must do at least.

Everything follows from seeds, so that another process makes the same. T tokens, H hidden, I intermediate, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

CHECKED_TOKENS = 16  # of a batch; float32 over all rows of a large one would take longer than the timing
ADAPTER_SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer; `experts` may be cut to what memory holds, the model has `model_experts`."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    model_experts: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.experts * self.expert_weights

    def with_experts(self, experts: int) -> "Shape":
        return replace(self, experts=experts)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("v2-lite", 2048, 1408, 64, 6, 64),
        Shape("v3", 7168, 2048, 256, 8, 256),
        Shape("qwen3-30b", 2048, 768, 128, 8, 128),
        Shape("small", 512, 352, 16, 4, 16),
    )
}


@dataclass(frozen=True)
class AdapterCase:
    """Loaded adapters, one rank a slot. Tokens pick slots at random, or none at all when `idle`."""

    name: str
    ranks: tuple[int, ...] = ()
    idle: bool = False

    @property
    def rank(self) -> int:
        return max(self.ranks, default=0)

    @property
    def count(self) -> int:
        return len(self.ranks)


def parse_adapters(text: str) -> AdapterCase:
    """none, COUNTxRANK or COUNTxmixed (ranks 8, 16, 64 in turn); `idle` behind it: loaded, but no token uses them."""
    if text == "none":
        return AdapterCase(text)
    count, _, rank = text.removesuffix("idle").partition("x")
    if not count.isdigit() or not (rank.isdigit() or rank == "mixed"):
        raise ValueError(f"--adapters: {text!r} is not none, COUNTxRANK or COUNTxmixed, each also with idle behind it")
    ranks = [(8, 16, 64)[slot % 3] if rank == "mixed" else int(rank) for slot in range(int(count))]
    return AdapterCase(text, tuple(ranks), text.endswith("idle"))


class Weights:
    """Gaussian bf16 weights: each matrix is a window of one buffer at its own offset, so a layer costs little memory.

    Experts beyond `distinct` repeat earlier ones, where there is no time to quantize all.
    """

    STEP = 2 * 64 + 1  # elements from one window to the next; odd, so that no two matrices have equal rows

    def __init__(self, shape: Shape, distinct: int | None = None, seed: int = 1) -> None:
        self.shape = shape
        self.distinct = min(distinct or shape.experts, shape.experts)
        generator = torch.Generator().manual_seed(seed)
        elements = shape.hidden * shape.intermediate + 3 * shape.experts * self.STEP
        noise = torch.randn(elements, generator=generator)
        self._into = (noise * shape.hidden**-0.5).bfloat16()
        self._out_of = (noise * shape.intermediate**-0.5).bfloat16()

    def expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate (I, H), up (I, H), down (H, I)."""
        shape, expert = self.shape, expert % self.distinct
        into, out_of = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        return (
            self._window(self._into, 3 * expert, into),
            self._window(self._into, 3 * expert + 1, into),
            self._window(self._out_of, 3 * expert + 2, out_of),
        )

    def _window(self, buffer: torch.Tensor, index: int, size: tuple[int, int]) -> torch.Tensor:
        first = index * self.STEP
        return buffer[first : first + size[0] * size[1]].view(size)

    def stacked(self) -> list[torch.Tensor]:
        """gate (E, I, H), up (E, I, H), down (E, H, I), each in memory of its own."""
        shape = self.shape
        into = (shape.experts, shape.intermediate, shape.hidden)
        out_of = (shape.experts, shape.hidden, shape.intermediate)
        stacks = [torch.empty(size, dtype=torch.bfloat16) for size in (into, into, out_of)]
        for expert in range(shape.experts):
            for stack, matrix in zip(stacks, self.expert(expert), strict=True):
                stack[expert].copy_(matrix)
        return stacks


@dataclass(frozen=True)
class Lora:
    """One adapter: A (E, r, in) and B (E, out, r) of gate, up and down, bf16; the delta is ADAPTER_SCALE * B A."""

    rank: int
    factors: tuple[torch.Tensor, ...]  # gate_a, gate_b, up_a, up_b, down_a, down_b

    @property
    def expert_bytes(self) -> int:
        return sum(2 * factor[0].numel() for factor in self.factors)


def make_lora(shape: Shape, rank: int, slot: int) -> Lora:
    generator = torch.Generator().manual_seed(1000 + slot)
    h, i = shape.hidden, shape.intermediate

    def factor(rows: int, columns: int, deviation: float) -> torch.Tensor:
        return torch.randn(shape.experts, rows, columns, generator=generator).mul_(deviation).bfloat16()

    # The delta is about a third of the base product: large enough that a wrong one fails the check.
    b = 0.3 / ADAPTER_SCALE * rank**-0.5
    pairs = [(h, i), (h, i), (i, h)]
    factors = [factor(*size, d) for a, o in pairs for size, d in (((rank, a), a**-0.5), ((o, rank), b))]
    return Lora(rank, tuple(factors))


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor  # (T, H) bf16
    ids: torch.Tensor  # (T, top_k) int64
    weights: torch.Tensor  # (T, top_k) float32
    slots: torch.Tensor | None  # (T,) int32

    @property
    def tokens(self) -> int:
        return int(self.x.shape[0])


def make_batch(shape: Shape, tokens: int, adapters: AdapterCase, seed: int) -> Batch:
    """Independent tokens, each with its own top_k experts and its own adapter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k, -1).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(-1)
    x = torch.randn(tokens, shape.hidden, generator=generator).bfloat16()
    slots = None
    if adapters.idle:
        slots = torch.full((tokens,), -1, dtype=torch.int32)
    elif adapters.ranks:
        slots = torch.randint(adapters.count, (tokens,), generator=generator, dtype=torch.int32)
    return Batch(x, ids.contiguous(), weights, slots)


def routed_rows(batch: Batch) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each expert that is hit: its index, the tokens, and which of their choices it is."""
    for expert in batch.ids.unique().tolist():
        token, choice = (batch.ids == expert).nonzero(as_tuple=True)
        yield expert, token, choice


def add_lora(
    out: torch.Tensor, x: torch.Tensor, projection: int, expert: int, loras: list[Lora], slots: torch.Tensor | None
) -> None:
    """Adds each row's adapter, in the dtype of `x`. Projection 0 is gate, 1 up, 2 down."""
    if slots is None:
        return
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero(as_tuple=True)[0]
        a, b = (factor[expert].to(x.dtype) for factor in loras[slot].factors[2 * projection : 2 * projection + 2])
        out.index_add_(0, rows, F.linear(F.linear(x[rows], a), b * ADAPTER_SCALE).to(out.dtype))


def checked_part(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """Tokens spread over the batch, as a batch of their own, and their rows."""
    rows = torch.linspace(0, batch.tokens - 1, min(batch.tokens, CHECKED_TOKENS)).long()
    slots = None if batch.slots is None else batch.slots[rows]
    return Batch(batch.x[rows], batch.ids[rows], batch.weights[rows], slots), rows


def reference(weights: Weights, loras: list[Lora], batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The layer's result, nothing rounded to bf16 on the way."""
    out = torch.zeros(batch.x.shape, dtype=dtype)
    x_all = batch.x.to(dtype)
    for expert, token, choice in routed_rows(batch):
        gate, up, down = (matrix.to(dtype) for matrix in weights.expert(expert))
        x, slots = x_all[token], None if batch.slots is None else batch.slots[token]
        g, u = F.linear(x, gate), F.linear(x, up)
        add_lora(g, x, 0, expert, loras, slots)
        add_lora(u, x, 1, expert, loras, slots)
        h = F.silu(g) * u
        y = F.linear(h, down)
        add_lora(y, h, 2, expert, loras, slots)
        out.index_add_(0, token, y * batch.weights[token, choice, None].to(dtype))
    return out


def relative_l2(result: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN or infinity anywhere gives a value that no limit accepts."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True)
class Need:
    """What any implementation must at least do: read each distinct expert and adapter once, multiply each row."""

    experts: int
    base_operations: float
    lora_bytes: float
    lora_operations: float


def need_of(shape: Shape, batch: Batch, loras: list[Lora]) -> Need:
    pairs = batch.ids.numel()
    operations = 2.0 * pairs * shape.expert_weights
    distinct = int(batch.ids.unique().numel())
    if batch.slots is None or int(batch.slots.max()) < 0:
        return Need(distinct, operations, 0.0, 0.0)
    keys = batch.slots[:, None].long() * shape.experts + batch.ids
    slots_hit = (keys.unique() // shape.experts).tolist()
    lora_bytes = float(sum(loras[slot].expert_bytes for slot in slots_hit))
    lora_operations = float(sum(loras[slot].expert_bytes for slot in batch.slots.tolist())) * shape.top_k
    return Need(distinct, operations, lora_bytes, lora_operations)  # 2 operations a weight of 2 bytes: one a byte


def make_batches(shape: Shape, tokens: int, adapters: AdapterCase) -> list[Batch]:
    """A case's batches, the same in every process; few of a large size, since each hits all experts anyway."""
    count = 32 if tokens <= 4 else 12 if tokens <= 64 else 4
    return [make_batch(shape, tokens, adapters, seed=100_000 * number + tokens) for number in range(count)]
