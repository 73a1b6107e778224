"""The adapters' part of resident experts, gathered for each choice and grouped by expert and slot: both against
float32, what they move, and which of them a batch takes. The products and sums that only a card has are in
test_resident_on_gpu.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import interpreted
from resident_batch import EXPERTS, HIDDEN, INNER, SLOTS, Batch, in_float32, random_pools
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 2.0**-8


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


def both(pools: Any, batch: Batch) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    from kt_sglang.experts.resident_adapters import GatheredHooks, GroupedHooks

    kinds = GatheredHooks(pools, batch.slots_T), GroupedHooks(pools, batch.slots_T)
    gathered, grouped = (batch.after(hooks) for hooks in kinds)
    return gathered, grouped


@pytest.mark.parametrize("rank", [1, 3, 8, 12])
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("chosen", ["mixed", "one slot", "base only", "nobody's", "one expert"])
def test_grouped_gives_what_gathered_and_float32_give(chosen: str, tokens: int, rank: int) -> None:
    pools = random_pools(rank)
    batch = Batch.random(tokens, chosen)
    inputs = [each.clone() for each in (batch.x_TH, batch.inner_PI, batch.weights_TK, batch.ids_TK, batch.slots_T)]
    gathered, grouped = both(pools, batch)
    for one, other in zip(
        inputs, (batch.x_TH, batch.inner_PI, batch.weights_TK, batch.ids_TK, batch.slots_T), strict=True
    ):
        assert torch.equal(one, other)
    acts = batch.adapted_TK.any()
    assert acts == (chosen not in ("base only", "nobody's"))
    for before, one, other, exact in zip(batch.before, gathered, grouped, in_float32(pools, batch), strict=True):
        untouched = ~batch.adapted_TK
        assert torch.equal(other[untouched], before[untouched])
        if acts:
            size = (exact - before.float())[batch.adapted_TK].norm()
            # The low-rank product, its product with B, its product with the weight and the sum are rounded: four times,
            # half a step each, of the sum if that is larger.
            allowed = 4 * EPS / 2 * (size + exact[batch.adapted_TK].norm())
            assert (other.float() - exact)[batch.adapted_TK].norm() < allowed < size / 4
            assert (one.float() - other.float()).norm() < allowed / 2


def test_rows_that_hold_anything_change_no_other_row() -> None:
    """SGLang leaves what it computes for nobody uninitialized."""
    pools, batch = random_pools(5), Batch.random(40, "mixed")
    expected, _ = both(pools, batch)
    nobodys = (batch.ids_TK < 0).view(-1)
    batch.inner_PI[nobodys] = float("nan")
    for before in batch.before:
        before[batch.ids_TK < 0] = float("nan")
    _, grouped = both(pools, batch)
    for one, other in zip(expected, grouped, strict=True):
        here = batch.ids_TK >= 0
        assert other[here].isfinite().all() and other[~here].isnan().all()
        torch.testing.assert_close(other[here], one[here], rtol=2 * EPS, atol=2 * EPS)


def test_experts_beyond_the_resident_ones_are_nobodys() -> None:
    from kt_sglang.experts.resident_adapters import GroupedHooks

    pools, batch = random_pools(8), Batch.random(20, "mixed")
    expected = batch.after(GroupedHooks(pools, batch.slots_T))
    batch.ids_TK[batch.ids_TK < 0] = pools.experts
    found = batch.after(GroupedHooks(pools, batch.slots_T))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("groups", [1 << 10, 9, 5])
@pytest.mark.parametrize("most", [1 << 28, 3000, 1])
def test_pieces_of_tokens_and_of_slots_give_the_same(most: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_sglang.experts import resident_adapters as module

    pools, batch = random_pools(8), Batch.random(33, "mixed")
    _, whole = both(pools, batch)
    monkeypatch.setattr(module, "MOST_GATHERED_BYTES", most)
    monkeypatch.setattr(module, "MOST_GROUPS", groups)
    pieces = list(module.GroupedHooks(pools, batch.slots_T)._sorted(batch.ids_TK))
    assert (len(pieces) > 1) == (most < 1 << 28 or groups < 1 << 10)
    assert all(len(piece.ends_G) <= groups for piece in pieces)
    _, cut = both(pools, batch)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


def test_what_is_multiplied_is_aligned_as_torchs_grouped_product_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks run on the meta device, where nothing is computed."""
    from kt_sglang.experts import resident_adapters as module
    from kt_sglang.prompts import streamed_sums

    calls = []

    def checked(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        for each in (rows, weights):
            assert each.data_ptr() % 16 == 0 and each.stride(0) % 8 == 0
        there = torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device="meta")
        with_there = torch.empty_strided(weights.shape, weights.stride(), dtype=weights.dtype, device="meta")
        out = torch._grouped_mm(there, with_there.transpose(-2, -1), offs=ends.to("meta"))
        assert ends.dtype == torch.int32 and len(ends) < 1024
        calls.append(out.shape)
        return streamed_sums.grouped(rows, weights, ends)

    monkeypatch.setattr(module, "grouped", checked)
    for rank in (1, 5, 8, 20):
        both(random_pools(rank), Batch.random(9, "mixed"))
    assert len(calls) == 4 * 5


class Moved(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, *(kwargs or {}).values(), out) if isinstance(each, torch.Tensor)]
        if not func.is_view:
            if "index" in str(func) and "index_put" not in str(func):
                tensors = [out, out]  # reads what it takes, not all there is
            self.bytes += sum(each.nbytes for each in tensors)
        return out


def moved(hooks: Any, batch: Batch) -> int:
    batch.after(hooks)
    counted = Moved()
    with counted:
        batch.after(hooks)
    return counted.bytes


def test_grouped_moves_factors_once_and_rows_a_few_times() -> None:
    from kt_sglang.experts.resident_adapters import GatheredHooks, GroupedHooks

    pools, batch = random_pools(32), Batch.random(400, "mixed")
    choices = batch.ids_TK.numel()
    rows = 2 * choices * 3 * (pools.hidden + pools.inner)  # x, gate and up, inner, and what is added to each
    factors = sum(pool.nbytes for pool in pools.pools)
    grouped, gathered = (moved(kind(pools, batch.slots_T), batch) for kind in (GroupedHooks, GatheredHooks))
    assert gathered > 2 * choices * pools.expert_bytes, "each choice's factors are read and written"
    assert grouped < factors + 8 * rows < gathered / 4
    twice = Batch.random(800, "mixed")
    more = moved(GroupedHooks(pools, twice.slots_T), twice) - grouped
    assert more < 8 * rows, "twice as many tokens read no more factors"


@pytest.mark.parametrize(
    ("tokens", "capturing", "warming_up", "grouped"),
    [
        (210, False, False, False),
        (212, False, False, True),
        (8192, False, False, True),
        (8192, True, False, False),
        (8192, False, True, False),
    ],
)
def test_a_large_batch_that_no_graph_captures_is_grouped(
    tokens: int, capturing: bool, warming_up: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_sglang.experts import resident_adapters as module

    known = SimpleNamespace(is_capturing=lambda x: capturing, is_warming_up=lambda x: warming_up)
    monkeypatch.setattr(module, "captured", known)
    pools = module.ResidentAdapters(1, 1, 8, 2048, 1408, torch.device("cpu"))
    pools.prepare()
    x_TH, ids_TK = torch.empty(tokens, 2048, device="meta"), torch.empty(tokens, 6, dtype=torch.int32, device="meta")
    hooks = pools.hooks(x_TH, ids_TK, torch.empty(tokens, dtype=torch.int32, device="meta"))
    assert isinstance(hooks, module.GroupedHooks if grouped else module.GatheredHooks)


def test_sizes_that_the_product_does_not_take_and_failures_leave_batches_gathered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kt_sglang.experts import resident_adapters as module
    from kt_sglang.prompts import streamed_sums

    def of(experts: int, hidden: int, inner: int) -> bool:
        pools = module.ResidentAdapters(1, experts, 1, hidden, inner, torch.device("cpu"))
        pools.prepare()
        return pools._can_group

    module._groups_right.cache_clear()
    assert of(2, 64, 48) and of(1023, 8, 8) and not of(1024, 8, 8) and not of(2, 60, 48) and not of(2, 64, 44)
    assert not caplog.records
    module._groups_right.cache_clear()
    monkeypatch.setattr(module, "grouped", lambda *its: streamed_sums.grouped(*its).flip(0))
    assert not of(2, 64, 48) and "gathered: grouped, they differ by" in caplog.text
    module._groups_right.cache_clear()

    def missing(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "grouped", missing)
    assert not of(2, 64, 48) and "gathered: RuntimeError: no kernel" in caplog.text
    module._groups_right.cache_clear()


@pytest.mark.parametrize("rank", [1, 8, 12])
def test_the_plan_counts_what_is_allocated(rank: int) -> None:
    from kt_launch.planning import memory_fit
    from kt_sglang.experts import resident_adapters as module

    pools = random_pools(rank)
    demand: Any = SimpleNamespace(max_rank=rank, expert_ranks=(rank,), max_per_batch=SLOTS, resident=EXPERTS)
    base: Any = SimpleNamespace(hidden_size=HIDDEN, moe_intermediate_size=INNER, moe_layers=(1, 2))
    assert memory_fit.resident_slot_bytes(demand, base) == 2 * sum(pool.nbytes for pool in pools.pools)
    assert module.MOST_GATHERED_BYTES == memory_fit.GATHERED


def test_rows_are_added_on_a_card_as_in_plain_torch() -> None:
    interpreted(ADDED)


ADDED = """
# The interpreter cuts bfloat16 off where a card rounds: half a step of the product, of up to 4, and of the sum.
import torch
from kt_sglang.prompts import streamed_kernels, streamed_sums
torch.manual_seed(1)
places, ends = torch.randperm(12), torch.tensor([0, 3, 3, 9], dtype=torch.int32)
rows, whole = torch.randn(12, 1100).bfloat16(), torch.randn(12, 2 * 1100).bfloat16()
rows[9:] = float("nan")
for weights in (None, torch.rand(12)):
    for half in (slice(0, 1100), slice(1100, 2200)):
        there, here = whole.clone(), whole.clone()
        streamed_sums.add_rows(here[:, half], rows, places, ends, weights)
        streamed_kernels.add_rows(there[:, half], rows, places, ends, weights)
        assert here.isfinite().all() and there.isfinite().all()
        torch.testing.assert_close(there, here, rtol=2**-7, atol=2**-5)
        added = rows[places] if weights is None else (rows[places] * weights[:, None]).bfloat16()
        wanted = whole.clone()
        wanted[places < 9, half] = (whole[:, half] + added)[places < 9]
        assert torch.equal(here, wanted) and not torch.equal(here, whole)
        untouched = slice(1100, 2200) if half.start == 0 else slice(0, 1100)
        assert torch.equal(there[:, untouched], whole[:, untouched])
        assert torch.equal(there[places >= 9], whole[places >= 9])
"""
