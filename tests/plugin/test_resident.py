"""Experts split over the model's device and kt_kernels, with adapters: both halves together give what kt_kernels gives
with all experts. On a CPU the resident half is plain torch; the hooks that add its adapters are those of a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import kt_kernels
from kt_model.errors import LaunchError
from kt_model.expert_profile import read_profile, write_profile

T, K, E, H, I, R, SLOTS = 6, 3, 8, 64, 48, 3, 3  # noqa: E741
EPS = 2.0**-8


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    topk_output: TopK


@dataclass
class Weights:
    """gate, up (E, I, H), down (E, H, I), and an adapter of each of two slots."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    adapters: dict[int, tuple[torch.Tensor, ...]]

    @classmethod
    def random(cls) -> Weights:
        dice = torch.Generator().manual_seed(4)

        def draw(*shape: int, size: float) -> torch.Tensor:
            return (torch.randn(shape, generator=dice) * size).bfloat16()

        base = (draw(E, I, H, size=0.1), draw(E, I, H, size=0.1), draw(E, H, I, size=0.1))
        shapes = ((E, R, H), (E, I, R), (E, R, H), (E, I, R), (E, R, I), (E, H, R))
        return cls(*base, {slot: tuple(draw(*shape, size=0.2) for shape in shapes) for slot in (0, 2)})

    def kernel(self, experts: tuple[int, ...]) -> kt_kernels.MoE:
        moe = kt_kernels.MoE(
            num_experts=len(experts), hidden_size=H, intermediate_size=I, pool=kt_kernels.ThreadPool(1)
        )
        for number, expert in enumerate(experts):
            moe.load_expert(number, self.gate[expert], self.up[expert], self.down[expert])
        for slot, factors in self.adapters.items():
            moe.set_adapter(slot, kt_kernels.Adapter(*(each[list(experts)].contiguous() for each in factors)))
        return moe

    def layer(self, experts: tuple[int, ...]) -> SimpleNamespace:
        chosen = list(experts)
        return SimpleNamespace(
            w13_weight=torch.cat((self.gate[chosen], self.up[chosen]), dim=1), w2_weight=self.down[chosen]
        )


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids (one of them nobody's), weights, slots: both adapters and the base."""
    dice = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=dice)[:K] for _ in range(T)])
    ids[1, 0] = -1
    return (
        torch.randn(T, H, generator=dice).bfloat16(),
        ids,
        torch.rand(T, K, generator=dice),
        torch.tensor([0, -1, 2, 2, 0, -1]),
    )


def on_cpu(moe: kt_kernels.MoE, x: torch.Tensor, ids: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(len(x), H)
    weights, slots = rest
    assert weights is not None
    moe.forward(x, ids.int(), weights, None if slots is None else slots.int(), out)
    return out


def resident_half(weights: Weights, placement: Any, pieces: int | None = None) -> Any:
    """(layer, ResidentExperts) with both adapters in its pools."""
    from kt_sglang.experts.resident import ResidentExperts

    layer, half = weights.layer(placement.resident), ResidentExperts(gpu_method=None)
    half.allocate_adapters(SLOTS, R + 2, layer)  # pools have room for larger ranks
    pad = torch.nn.functional.pad
    for slot, factors in weights.adapters.items():
        gate_a, gate_b, up_a, up_b, down_a, down_b = (each[list(placement.resident)] for each in factors)
        wide = [pad(each, (0, 0, 0, 2)) for each in (gate_a, up_a, down_a)]
        tall = [pad(each, (0, 2)) for each in (gate_b, up_b, down_b)]
        assert half.adapters is not None
        half.adapters.fill(slot, (wide[0], tall[0], wide[1], tall[1], wide[2], tall[2]))
    return layer, half


PLACEMENTS = [(0,), tuple(range(7)), (1, 2, 5, 7)]


@pytest.mark.parametrize("resident", PLACEMENTS, ids=str)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "base"])
@pytest.mark.parametrize("most", [1 << 28, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("least", [200 << 20, 0], ids=["gathered", "grouped"])
def test_both_halves_give_what_all_experts_on_the_cpu_give(
    resident: tuple[int, ...], adapted: bool, most: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_sglang.experts import resident_adapters as module
    from kt_sglang.moe.placement import Placement

    monkeypatch.setattr(module, "MOST_GATHERED_BYTES", most)
    monkeypatch.setattr(module, "LEAST_GROUPED_BYTES", least)
    weights, placement = Weights.random(), Placement(E, resident)
    x, ids, scores, slots = batch()
    chosen = slots if adapted else None
    whole = on_cpu(weights.kernel(tuple(range(E))), x, ids, scores, chosen)
    base = on_cpu(weights.kernel(tuple(range(E))), x, ids, scores, None)
    layer, half = resident_half(weights, placement)
    theirs = Dispatched(x, TopK(scores, placement.resident_ids(ids)))
    before = [each.clone() for each in (x, ids, scores, slots)]
    from_device = half.run(layer, theirs, chosen)
    from_cpu = on_cpu(weights.kernel(placement.on_cpu), x, placement.cpu_ids(ids), scores, chosen)
    assert all(torch.equal(one, then) for one, then in zip((x, ids, scores, slots), before, strict=True))
    # bfloat16 rounds gate, up, their product, down and the sum of the resident half: five times, half a step each.
    off = (from_device + from_cpu - whole).norm() / whole.norm()
    assert off < 5 * EPS / 2
    if adapted:
        assert (whole - base)[slots >= 0].norm() / base.norm() > 20 * off and from_device.norm() > 20 * off


def test_an_emptied_slot_is_the_base_again() -> None:
    from kt_sglang.moe.placement import Placement

    weights, placement = Weights.random(), Placement(E, (1, 2, 5, 7))
    layer, half = resident_half(weights, placement)
    x, ids, scores, slots = batch()
    theirs = Dispatched(x, TopK(scores, placement.resident_ids(ids)))
    adapted, bare = half.run(layer, theirs, slots), half.run(layer, theirs, None)
    half.adapters.empty(0)
    found = half.run(layer, theirs, slots)
    assert torch.equal(found[slots != 2], bare[slots != 2]) and torch.equal(found[slots == 2], adapted[slots == 2])
    assert torch.equal(half.run(layer, theirs, torch.full((T,), -1)), bare)


def of_model(*layers: Any) -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(modules=lambda: layers))


def test_one_layer_is_run_with_each_kind_of_size_before_anybody_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_sglang.experts.method import KTEPWrapperMethod, after_load_model
    from kt_sglang.experts.resident import ResidentExperts

    weights, ran = Weights.random(), []

    def noted(self: Any, layer: Any, dispatched: Any, slots: Any) -> torch.Tensor:
        ids = dispatched.topk_output.topk_ids
        assert ids.dtype == torch.int32 and int(ids.max()) < 5 and int(ids.min()) == 0 and slots is None
        ran.append((id(layer), ids.numel()))
        return run(self, layer, dispatched, slots)

    run = ResidentExperts.run
    monkeypatch.setattr(ResidentExperts, "run", noted)
    layers = [weights.layer((0, 2, 3, 4, 7)) for _ in range(3)]
    for layer, count in zip(layers, (0, 5, 5), strict=True):
        layer.quant_method = KTEPWrapperMethod(None, SimpleNamespace(num_gpu_experts=count, layer_idx=count))
        layer.quant_method.moe_runner_config = SimpleNamespace(top_k=K)
    assert after_load_model("loaded", of_model(SimpleNamespace(), *layers)) == "loaded"
    assert {layer for layer, _ in ran} == {id(layers[1])}
    choices = [count for _, count in ran]
    assert {count % 16 for count in choices if count > 5 * K} == set(range(16))
    assert set(range(K, 6 * K, K)) <= {*choices}
    assert after_load_model("loaded", of_model(layers[0])) == "loaded"


def test_kernels_that_cannot_be_compiled_ahead_are_told_and_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from kt_sglang.experts.resident import ResidentExperts

    layer = SimpleNamespace(w2_weight=torch.zeros(2, 8, 4).bfloat16())
    ResidentExperts(gpu_method=None).compile_kernels(layer, 2)
    assert "resident experts were not compiled ahead: AttributeError" in caplog.text


def test_each_half_numbers_its_experts_and_leaves_the_others_out() -> None:
    from kt_sglang.moe.placement import Placement

    placement = Placement(5, (1, 4))
    ids = torch.tensor([[0, 1], [4, 3], [-1, 2]])
    assert placement.on_cpu == (0, 2, 3)
    assert placement.cpu_ids(ids).tolist() == [[0, -1], [-1, 2], [-1, 1]]
    assert placement.resident_ids(ids).tolist() == [[-1, 0], [1, -1], [-1, -1]]
    assert ids.tolist() == [[0, 1], [4, 3], [-1, 2]]
    assert Placement(5).cpu_ids(ids) is ids and Placement(5).cpu_numbers == ()
    assert placement.cpu_numbers == (0, -1, 1, 2, -1)
    assert placement.resident_ids(ids.int()).tolist() == [[-1, 0], [1, -1], [-1, -1]]


def test_a_captured_layer_leaves_resident_experts_out() -> None:
    from kt_sglang.decode.captured import CapturedSteps
    from kt_sglang.decode.handover import HostFunctions
    from kt_sglang.moe.placement import Placement

    weights, placement, record = Weights.random(), Placement(E, (1, 2, 5, 7)), kt_kernels.HostRecord()
    moe, calls = weights.kernel(placement.on_cpu), []
    steps = CapturedSteps(HostFunctions(lambda *call: calls.append(call)), pinned=False)
    steps.prepare(T, K, H)
    x, ids, scores, slots = batch()
    steps.run(moe, record, x, ids, scores, slots, placement.cpu_numbers)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(calls[0][0])(calls[0][1])
    expected = on_cpu(moe, x, placement.cpu_ids(ids), scores, slots)
    assert torch.equal(steps._buffers[(T, K, H)].out_TH, expected.bfloat16()) and record.failure is None
    steps._buffers[(T, K, H)].ids_TK[0, 0] = E
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(calls[0][0])(calls[0][1])
    assert record.failure == f"topk_ids: expected less than {E}, got {E}"


class Streams:
    """Stands for two streams: the side runs when it is joined, as late as a real one may."""

    def __init__(self) -> None:
        self.done: list[str] = []

    @contextmanager
    def forked(self) -> Iterator[None]:
        self.done.append("forked")
        yield

    def join(self) -> None:
        self.done.append("joined")


def test_the_device_computes_between_fork_and_join() -> None:
    from kt_sglang.decode.captured import CapturedSteps
    from kt_sglang.decode.handover import HostFunctions

    streams = Streams()
    steps = CapturedSteps(HostFunctions(lambda *_: None), pinned=False, side=lambda: streams)
    steps.prepare_side()

    def half(name: str, value: float) -> torch.Tensor:
        streams.done.append(name)
        return torch.full((T, H), value)

    out = steps.run_beside(lambda: half("cpu", 1.0), lambda: half("device", 2.0))
    assert streams.done == ["forked", "cpu", "device", "joined"] and torch.equal(out, torch.full((T, H), 3.0))


def test_the_most_used_experts_of_a_profile_are_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_model.contract import EXPERT_PROFILE
    from kt_sglang.moe import placement

    path = tmp_path / "profile.json"
    write_profile(path, {1: [5, 0, 9, 5], 2: [0, 0, 0, 1]})
    monkeypatch.setenv(EXPERT_PROFILE, str(path))
    assert placement.placement_of(1, 4, 2).resident == (0, 2)
    assert placement.placement_of(2, 4, 2).resident == (0, 3)
    assert placement.placement_of(1, 4, 0).resident == () and placement.name_of(0, 4) == ""
    assert placement.name_of(2, 4) not in (placement.name_of(1, 4), "first 2")
    assert read_profile(path, 4).share(1) == 10 / 20
    monkeypatch.delenv(EXPERT_PROFILE)
    assert placement.placement_of(1, 4, 2).resident == (0, 1) and placement.name_of(2, 4) == "first 2"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "expected"),
        ('{"format": "kt-launch expert profile", "layers": {"1": [1, 2]}}', "layer 1 has 2 experts, the model 4"),
        ('{"format": "kt-launch expert profile", "layers": {"1": [1, 2, 3, -1]}}', "is no profile"),
        ('{"format": "other", "layers": {"1": [1, 2, 3, 4]}}', "is no profile"),
        ('{"format": "kt-launch expert profile", "layers": {}}', "is no profile"),
        ("[" * 100000, "expected"),
    ],
)
def test_what_is_no_profile_is_refused(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(LaunchError, match=told):
        read_profile(path, 4)


def test_choices_are_counted_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_model.contract import RECORD_EXPERTS
    from kt_sglang.moe import recording

    path = tmp_path / "profile.json"
    monkeypatch.setattr(recording, "_counts", {})
    monkeypatch.setattr(recording, "_written", {"at_s": float("-inf")})
    recording.batch_ran(1, torch.tensor([[0, 1]]), 4)
    assert not path.exists()
    monkeypatch.setenv(RECORD_EXPERTS, str(path))
    monkeypatch.setattr(recording, "EVERY_S", 0.0)
    recording.batch_ran(1, torch.tensor([[0, 1], [1, -1]]), 4)
    recording.batch_ran(2, torch.tensor([[3, 3]]), 4)
    recording.batch_ran(1, torch.tensor([[2, 1]]), 4)
    recording.batch_ran(2, torch.tensor([[0, 3]]), 4)
    assert read_profile(path, 4).layers == {1: [1, 3, 1, 0], 2: [1, 0, 0, 3]}
    monkeypatch.setattr(recording, "_replayed", {})
    for number in (2, 3):
        record: Any = SimpleNamespace(count_experts=lambda count: None, expert_counts=lambda: [5, 0, 0, 1])
        recording.layer_loaded(number, record, 4)
    recording.step_ran()
    assert read_profile(path, 4).layers == {1: [1, 3, 1, 0], 2: [6, 0, 0, 4], 3: [5, 0, 0, 1]}


def test_a_rank_that_has_whole_experts_cuts_adapters_for_its_resident_ones_as_sglang_does() -> None:
    from sglang.srt.lora.layers import FusedMoEWithLoRA as Stock

    from kt_sglang.adapters.lora import FusedMoEWithLoRA

    dice = torch.Generator().manual_seed(7)
    shapes = ((E, R, H), (E, I, R), (E, R, H), (E, I, R), (E, R, I), (E, H, R))
    gate_a, gate_b, up_a, up_b, down_a, down_b = whole = tuple(torch.randn(shape, generator=dice) for shape in shapes)
    config = SimpleNamespace(is_gated=True)
    layer: Any = SimpleNamespace(
        tp_size=1,
        base_layer=SimpleNamespace(moe_tp_size=2, moe_runner_config=config),
        intermediate_size_per_partition=I // 2,
        _uses_interleaved_gate_up=False,
    )
    found = FusedMoEWithLoRA._as_residents(layer, whole)
    pairs = torch.cat((gate_b, up_b), dim=1)
    both_b = [Stock._slice_moe_b_2d(layer, pair, 0, "gate_up_proj_moe") for pair in pairs]
    expected_gate_b, expected_up_b = torch.stack(both_b).chunk(2, dim=1)
    expected_down_a = Stock._slice_moe_a(layer, down_a, 0, "down_proj_moe")
    expected = (gate_a, expected_gate_b, up_a, expected_up_b, expected_down_a, down_b)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert found[1].shape == (E, I // 2, R) != whole[1].shape
