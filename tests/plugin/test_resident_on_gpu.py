"""What a CPU device does not have of resident experts' adapters: torch's own grouped product, Triton's sum, and graphs.
Runs where there is a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from resident_batch import SLOTS, Batch, in_float32, random_pools

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EPS = 2.0**-8


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


@pytest.mark.parametrize("rank", [1, 8, 12])
@pytest.mark.parametrize("chosen", ["mixed", "one slot", "base only", "nobody's", "one expert"])
def test_grouped_gives_on_a_card_what_gathered_and_float32_give(chosen: str, rank: int) -> None:
    from kt_sglang.experts.resident_adapters import GatheredHooks, GroupedHooks

    pools, batch = random_pools(rank, "cuda"), Batch.random(500, chosen, "cuda")
    kinds = GatheredHooks(pools, batch.slots_T), GroupedHooks(pools, batch.slots_T)
    gathered, grouped = (batch.after(hooks) for hooks in kinds)
    here = batch.adapted_TK
    for before, one, other, exact in zip(batch.before, gathered, grouped, in_float32(pools, batch), strict=True):
        assert torch.equal(other[~here], before[~here])
        allowed = 4 * EPS / 2 * (2 * exact.norm() + before.float().norm().cpu())
        assert (other.float().cpu() - exact).norm() <= allowed and (one.float() - other.float()).norm().cpu() <= allowed


@pytest.mark.parametrize(("hidden", "inner", "rank"), [(2048, 1408, 8), (2048, 768, 16), (7168, 2048, 4)], ids=str)
def test_it_is_found_right_at_the_start_with_sizes_of_published_models(hidden: int, inner: int, rank: int) -> None:
    from kt_sglang.experts.resident_adapters import ResidentAdapters

    pools = ResidentAdapters(2, 2, rank, hidden, inner, torch.device("cuda"))
    pools.prepare()
    assert pools._can_group


def test_no_graph_captures_what_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch eager, captured, and replayed with other slots in the same buffer."""
    from kt_sglang.experts import resident_adapters as module

    monkeypatch.setattr(module, "LEAST_GROUPED_BYTES", 0)
    pools, batch = random_pools(8, "cuda"), Batch.random(64, "mixed", "cuda")
    pools.prepare()

    def hooks() -> Any:
        return pools.hooks(batch.x_TH, batch.ids_TK, batch.slots_T)

    assert isinstance(hooks(), module.GroupedHooks)
    eager = batch.after(hooks())
    batch.after(module.GatheredHooks(pools, batch.slots_T))
    torch.cuda.synchronize()
    graph, captured = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        captured.append(hooks())
        captured.append(batch.after(captured[0]))
    assert isinstance(captured[0], module.GatheredHooks)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(eager, captured[1], strict=True):
            assert (one.float() - other.float()).norm() <= 2 * EPS * one.float().norm()
        batch.slots_T.copy_((batch.slots_T + 1) % SLOTS)
        eager = batch.after(hooks())
