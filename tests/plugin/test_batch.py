"""A batch's way through the plugin: nothing that the model owns is changed, and tensor-parallel parts add up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

T, K, E, H, I = 5, 2, 4, 64, 48  # noqa: E741  # tokens, top-k, experts, hidden, intermediate


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(T, H, generator=generator).to(torch.bfloat16)
    ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return x_TH, ids_TK, torch.rand(T, K, generator=generator)


def test_bug_7_gathering_a_batch_changes_no_input() -> None:
    from kt_sglang.moe.transfer import HostBatch

    x, ids, weights = batch()
    slots = torch.tensor([0, -1, 1, 0, -1])
    before = [t.clone() for t in (x, ids, weights, slots)]
    HostBatch.gather(x, ids - 1, weights, slots)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, ids, weights, slots), strict=True))


def test_host_memory_that_cannot_be_pinned_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_launch.watching.diagnosis import diagnose
    from kt_sglang.moe import transfer

    def refused(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(RuntimeError, match="120 bytes of host memory cannot be pinned: CUDA error") as failure:
        transfer.pinned(3, 10, dtype=torch.float32)
    found = diagnose(f"Traceback (most recent call last):\nRuntimeError: {failure.value}\n")
    assert found.signature and found.signature.title == "Host memory cannot be pinned"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bug_6_the_result_has_the_callers_dtype_and_device(dtype: torch.dtype) -> None:
    from kt_sglang.moe.transfer import HostBatch

    x, ids, weights = batch()
    gathered = HostBatch.gather(x.to(dtype), ids, weights, None)
    assert gathered.x_TH.dtype == torch.bfloat16 and gathered.ids_TK.dtype == torch.int32
    back = gathered.give_back(torch.zeros_like(gathered.x_TH))
    assert back.dtype == dtype and back.device == x.device


def expert_weights(tp_rank: int, tp_size: int):  # type: ignore[no-untyped-def]
    from kt_sglang.checkpoint.weights import ExpertWeights
    from kt_sglang.moe.placement import Placement

    config = SimpleNamespace(
        layer_idx=0, weight_path="nowhere", method="AMXBF16_SFT", cpuinfer_threads=1, threadpool_count=1
    )
    layer = SimpleNamespace(moe_tp_rank=tp_rank, moe_tp_size=tp_size)
    return ExpertWeights(config, layer, Placement(E), H)


def load_all(weights) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(5)
    load = weights.loader(lambda *_: pytest.fail("a CPU expert went to the device"))
    for expert in range(E):
        for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I))):
            load(None, torch.randn(shape, generator=generator).to(torch.bfloat16) * 0.1, "x.weight", name, expert)


def output(weights) -> torch.Tensor:  # type: ignore[no-untyped-def]
    x, ids, scores = batch()
    out = torch.empty(T, H)
    weights.moe.forward(x, ids, scores, None, out)
    return out


def test_tensor_parallel_parts_add_up_to_the_whole() -> None:
    outputs = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        weights = expert_weights(rank, size)
        load_all(weights)
        weights.require_complete()
        outputs.append(output(weights))
    whole, first, second = outputs
    assert float((first + second - whole).norm() / whole.norm()) < 0.01


def test_the_first_rank_has_the_whole_and_the_others_give_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_sglang.experts.method import KTEPWrapperMethod

    alone = expert_weights(0, 1)
    load_all(alone)
    monkeypatch.setenv("KT_LAUNCH_TP_EXPERTS", "rank0")
    first = expert_weights(0, 2)
    load_all(first)
    assert torch.equal(output(first), output(alone))
    assert first.cache_key == alone.cache_key and not first.is_part

    config = SimpleNamespace(layer_idx=0, num_gpu_experts=0)
    further = KTEPWrapperMethod(SimpleNamespace(create_weights=lambda **_: None), config)
    layer = SimpleNamespace(moe_tp_rank=1, moe_tp_size=2)
    further.create_weights(layer, E, H, I // 2, torch.bfloat16, weight_loader=lambda *_: None)
    load_all(further.weights)
    further.process_weights_after_loading(layer)
    x, ids, scores = batch()
    assert torch.equal(further._run(x, (scores, ids, None), None), torch.zeros_like(x))
    assert torch.equal(further._run(x, (scores, ids, None), lambda: x), x)
    report = further.record.as_dict()
    assert (report["experts"], report["batches"], report["passed"]) == (0, 0, 2)


def test_an_incomplete_checkpoint_is_named() -> None:
    weights = expert_weights(0, 1)
    load = weights.loader(lambda *_: None)
    for name, shape in (("w1", (I, H)), ("w3", (I, H)), ("w2", (H, I))):
        load(None, torch.zeros(shape, dtype=torch.bfloat16), "x.weight", name, 2)
    with pytest.raises(
        RuntimeError, match=r"3 of 4 CPU experts were not loaded from nowhere \(first missing: expert 0\)"
    ):
        weights.require_complete()


def test_resident_experts_keep_sglangs_own_loader_under_their_own_numbers() -> None:
    from kt_sglang.checkpoint.weights import ExpertWeights
    from kt_sglang.moe.placement import Placement

    config = SimpleNamespace(layer_idx=0, weight_path="", method="AMXBF16_SFT", cpuinfer_threads=1, threadpool_count=1)
    layer = SimpleNamespace(moe_tp_rank=0, moe_tp_size=1)
    weights = ExpertWeights(config, layer, Placement(E, (1, 3)), H)
    passed_on: list[tuple[int, int]] = []
    load = weights.loader(lambda param, weight, name, shard, expert: passed_on.append((int(weight[0, 0]), expert)))
    for expert in range(E):
        load(None, torch.full((I, H), expert), "x.weight", "w1", expert)
    assert passed_on == [(1, 0), (3, 1)]


def test_experts_from_elsewhere_are_left_unread_and_nothing_else(tmp_path: Path) -> None:
    from kt_sglang.checkpoint.reading import iterate_needed

    needed = {f"model.layers.1.{name}": torch.full((2, 2), number) for number, name in enumerate(("a", "b", "c"))}
    experts = {f"model.layers.1.mlp.experts.{number}.up_proj.weight": torch.zeros(3) for number in range(4)}
    save_file(needed, tmp_path / "1.safetensors")
    save_file(experts, tmp_path / "2.safetensors")
    files = [str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors")]
    last = "model.layers.1.mlp.experts.3.up_proj.weight"
    found = dict(iterate_needed(files, frozenset(experts) - {last}))
    assert found.keys() == {*needed, last}
    assert all(torch.equal(found[name], needed[name]) for name in needed)
