"""When experts come to the device: not before it was shown, for the base and each adapter in every layer, that they
compute there what kt_kernels computes. On a CPU device; what only a card has is not here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streamed_layer import EPS, Case, batch, case, close

import kt_kernels
from kt_model.prefill_buffers import Buffers, buffers
from kt_model.units import GIB, MIB

EXPERTS, HIDDEN, INNER = 7, 128, 64


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process of two layers, of which SGLang holds adapters x and z in slots 0 and 2."""
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from kt_sglang.moe import layers
    from kt_sglang.moe.placement import Placement
    from kt_sglang.prompts import prefill

    cases = {number: case("AMXBF16_SFT", HIDDEN, INNER, experts=EXPERTS) for number in (1, 2)}
    registry = layers.Layers(slots={0: "x", 2: "z"})
    for number, each in cases.items():
        registry.weights[number] = SimpleNamespace(
            layer_id=number, moe=each.moe, placement=Placement(EXPERTS), is_complete=True, top_k=3
        )
        pools = each.pools([*range(EXPERTS)], EXPERTS)
        registry.records[number] = SimpleNamespace(lora=SimpleNamespace(pools=pools))  # type: ignore[assignment]
    monkeypatch.setattr(prefill, "LAYERS", registry)
    monkeypatch.setattr(prefill, "_of_process", [])
    yield SimpleNamespace(cases=cases, layers=registry)


def started(**asked: Any) -> Any:
    from kt_sglang.prompts import prefill

    own = prefill.start(asked, torch.device("cpu"))
    assert prefill.prefill() is own
    return own


def runs(own: Any, layer: int, made: Case, slots: torch.Tensor | None, tokens: int = 12) -> None:
    """One batch as experts/method.py computes it."""
    from kt_sglang.moe.transfer import HostBatch

    x, ids, scores, _ = batch(tokens, HIDDEN, EXPERTS)
    expected = made.in_float32(x, ids, scores, slots)
    if own.takes(layer, tokens, slots):
        close(own.run(layer, x, ids, scores, slots), expected, 2 * EPS)
    else:
        own.check(layer, made.moe, x, HostBatch.gather(x, ids, scores, slots))


def slots_of(*slots: int) -> torch.Tensor:
    return torch.tensor(slots)[torch.arange(12) % len(slots)]


def test_nothing_is_used_before_it_was_shown(process: Any) -> None:
    own = started(tokens=8)
    assert own.state == "proving"
    process.layers.slots = {}
    for layer, made in process.cases.items():
        assert not own.takes(layer, 12, None)
        runs(own, layer, made, None)
    assert (own.state, own.report()["tokens_ran"]) == ("on", 0)
    assert own.takes(1, 8, None) and not own.takes(1, 7, None) and not own.takes(9, 12, None)
    for layer, made in process.cases.items():
        runs(own, layer, made, None)
    report = own.report()
    assert report["tokens_ran"] == 12 and report["adapter_tokens_ran"] == 0 and report["bytes"] > 0
    assert [*report["errors"]] == ["base"] and 0 < report["errors"]["base"] < 0.02


def test_an_adapter_is_shown_apart_and_its_first_batch_stays_on_the_cpu(process: Any) -> None:
    own = started(tokens=8)
    process.layers.slots = {0: "x"}
    mixed = slots_of(0, -1)
    for layer, made in process.cases.items():
        runs(own, layer, made, mixed)
    assert own.state == "on" and all(own.takes(layer, 12, mixed) for layer in process.cases)
    process.layers.slots = {0: "x", 2: "z"}
    assert not own.takes(1, 12, mixed), "a slot that nobody asked for may be asked for"
    assert own.takes(1, 12, None)
    for _ in range(2):
        for layer, made in process.cases.items():
            runs(own, layer, made, slots_of(0, 2, -1))
    report = own.report()
    assert {*report["errors"]} == {"base", "x", "z"}
    assert (report["tokens_ran"], report["adapter_tokens_ran"]) == (12, 8)


def first_batch(own: Any, process: Any, slots: torch.Tensor | None, *, nobodys: bool = False, size: float = 1) -> None:
    """Computed by kt_kernels. nobodys: all choices are of experts that are resident."""
    from kt_sglang.moe.transfer import HostBatch

    for layer, made in process.cases.items():
        x, ids, scores, _ = batch(12, HIDDEN, EXPERTS)
        ids = torch.full_like(ids, -1) if nobodys else ids
        assert not own.takes(layer, 12, slots)
        own.check(layer, made.moe, x * size, HostBatch.gather(x * size, ids, scores, slots))


def test_what_is_used_rarely_is_shown_with_the_first_batch_too(process: Any) -> None:
    """With most experts resident, and those that are chosen most: a batch may need none of the others."""
    own = started(tokens=8)
    process.layers.slots = {0: "x"}
    first_batch(own, process, slots_of(0, -1), nobodys=True)
    assert own.state == "on" and all(own.takes(layer, 12, slots_of(0)) for layer in process.cases)
    errors = own.report()["errors"]
    assert {*errors} == {"base", "x"} and min(errors.values()) > 0 and max(errors.values()) < 0.02


def test_what_is_used_rarely_is_compared_with_what_it_should_be(process: Any) -> None:
    own = started(tokens=8)
    own.sources[2].packed = [packed.flip(0) for packed in own.sources[2].packed]
    first_batch(own, process, None, nobodys=True)
    assert own.state == "off" and "layer 2 differs from kt_kernels by" in own.why


@pytest.mark.parametrize(("top_k", "experts"), [(3, 1), (3, 2), (3, 3), (2, 7)])
def test_experts_that_nobody_chose_are_chosen_once_a_row(top_k: int, experts: int) -> None:
    from kt_sglang.prompts.prefill import some_chosen

    ids = some_chosen(torch.full((12, top_k), -1, dtype=torch.int32), experts)
    assert ids.dtype == torch.int32 and {*ids.unique().tolist()} - {-1} == {*range(experts)}
    for row in ids.tolist():
        here = [expert for expert in row if expert >= 0]
        assert len(here) == len({*here}) == min(top_k, experts)
    router = torch.tensor([[-1, 0, -1]])
    assert some_chosen(router, 5) is router


def test_rows_without_numbers_show_nothing_and_end_nothing(process: Any) -> None:
    own = started(tokens=8)
    process.layers.slots = {0: "x"}
    streamer, own.streamer = own.streamer, None  # not even asked, layer after layer
    first_batch(own, process, slots_of(0, -1), size=float("nan"))
    own.streamer = streamer
    assert own.state == "proving" and own.report()["errors"] == {}
    first_batch(own, process, None)
    assert own.state == "on" and own.takes(1, 12, None) and not own.takes(1, 12, slots_of(0))
    pools, whole = process.layers.records[2].lora.pools, process.cases[2].factors[0]
    for factor, works in ((1e25, False), (1e-25, True)):  # the product of both overflows float32
        for pool in pools[2:]:
            pool[0] *= factor
        huge = [each * 1e25 for each in whole[4:]]
        process.cases[2].moe.set_adapter(0, kt_kernels.Adapter(*whole[:4], *(whole[4:] if works else huge)))
        first_batch(own, process, slots_of(0))
        assert own.state == "on" and own.takes(1, 12, slots_of(0)) == works


def test_adapters_that_are_gone_are_forgotten(process: Any) -> None:
    own = started(tokens=8)
    process.layers.slots = {}
    first_batch(own, process, None)
    for turn in range(5):
        process.layers.slots_changed({0: f"x{turn}"}, loaded=["kept", f"x{turn}"])
        first_batch(own, process, slots_of(0))
        process.layers.checked[f"x{turn}"] = 0.0
        if not turn:
            process.layers.slots_changed({0: "kept"}, loaded=["kept"])
            first_batch(own, process, slots_of(0))
            process.layers.checked["kept"] = 0.0
    assert {*own.report()["errors"]} == {"base", "kept", "x4"} and own.state == "on"


def test_other_weights_on_the_device_are_noticed(process: Any, caplog: pytest.LogCaptureFixture) -> None:
    own = started(tokens=8)
    source = own.sources[2]
    source.packed = [packed.flip(0) for packed in source.packed]
    for layer, made in process.cases.items():
        runs(own, layer, made, None)
    assert own.state == "off" and "layer 2 differs from kt_kernels by" in own.why
    assert not own.takes(1, 12, None) and own.streamer is None
    assert "gpu prefill: off: layer 2" in caplog.text
    runs(own, 1, process.cases[1], slots_of(0, 2))


@pytest.mark.parametrize("wrong", ["none", "another", "half"])
def test_another_adapter_on_the_device_is_noticed(process: Any, wrong: str) -> None:
    own = started(tokens=8)
    pools = process.layers.records[2].lora.pools
    for pool in pools:
        pool[0] = {"none": pool[0] * 0, "another": pool[2], "half": pool[0] / 2}[wrong]
    for layer, made in process.cases.items():
        runs(own, layer, made, slots_of(0, -1))
    assert own.state == "off" and "layer 2: what adapter x changes differs" in own.why


def test_what_is_measured_leaves_resident_experts_out(process: Any) -> None:
    from kt_sglang.moe.placement import Placement
    from kt_sglang.prompts.crossing import random_batch

    resident = tuple(range(3, 3 + 3 * EXPERTS))  # three quarters of them
    process.layers.weights[1].placement = Placement(4 * EXPERTS, resident)
    x_TH, ids_TK, weights_TK = random_batch(2000, process.layers.weights[1], HIDDEN, torch.device("cpu"))
    assert x_TH.shape == (2000, HIDDEN) and ids_TK.shape == weights_TK.shape == (2000, 3)
    assert set(ids_TK.unique().tolist()) == {-1, *range(EXPERTS)}
    assert 0.73 < float((ids_TK < 0).float().mean()) < 0.77
    process.layers.weights[1].placement = Placement(EXPERTS)
    _, ids_TK, _ = random_batch(2000, process.layers.weights[1], HIDDEN, torch.device("cpu"))
    assert set(ids_TK.unique().tolist()) == set(range(EXPERTS))


def test_what_auto_takes_was_measured(process: Any) -> None:
    own = started(tokens=None)
    report = own.report()
    assert report["measured"][0][0] == 32 and all(cpu > 0 and gpu > 0 for _, cpu, gpu in report["measured"])
    for layer, made in process.cases.items():
        runs(own, layer, made, None)
    last, between = report["measured"][-1], own.report()["between_ms"]
    assert between > 0
    assert own.state == ("on" if last[2] <= last[1] + between else "off")
    assert own.why.startswith("measured, a layer" if own.state == "on" else "the CPU is faster at 8192 tokens")


def test_what_passes_between_two_layers_counts_for_the_card(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("kt_sglang.prompts.prefill.Prefill._measure", lambda own: None)
    own = started(tokens=None)
    own.measured = [(32, 5.0, 900.0), (64, 10.0, 900.0)]
    monkeypatch.setattr("kt_sglang.prompts.crossing.time.perf_counter", lambda: float(next(now)))
    for _ in range(2):
        for layer, made in process.cases.items():
            runs(own, layer, made, None)
    assert own.report()["between_ms"] == 1000 and (own.state, own.tokens) == ("on", 32)
    assert own.why.endswith("1000.0 ms between two layers, in which kt_kernels waits and experts come")


@pytest.mark.parametrize(
    ("measured", "tokens"),
    [
        ([], None),
        ([(32, 1.0, 2.0), (64, 2.0, 2.1)], None),
        ([(32, 3.0, 2.0), (64, 4.0, 2.0)], 32),
        ([(32, 1.0, 2.0), (64, 3.0, 2.0)], 64),
        ([(512, 10.0, 20.0), (1024, 15.0, 20.0), (2048, 30.0, 20.0)], 1376),
        ([(32, 3.0, 2.0), (64, 1.0, 2.0), (128, 3.0, 2.0)], 128),
        ([(32, 6.8, 5.0), (64, 4.6, 5.0), (128, 8.0, 5.0)], 96),
        ([(32, 6.8, 5.0), (64, 6.9, 5.1), (128, 4.6, 5.2), (256, 12.0, 6.0)], 160),
        ([(32, 6.8, 5.0), (64, 5.6, 5.1), (128, 8.0, 5.2)], 32),
        ([(32, 4.0, 3.0), (64, 5.0, 9.0), (128, 8.0, 4.0)], 32),
    ],
)
def test_the_crossing_lies_where_the_card_is_faster_from_then_on(
    measured: list[tuple[int, float, float]], tokens: int | None
) -> None:
    from kt_sglang.prompts.crossing import crossing

    assert crossing(measured) == tokens


@pytest.mark.parametrize(
    ("spent_ms", "found", "tokens"),
    [
        ([9.0, 3.0, 9.5, 3.1], [(32, 9.0, 3.0), (64, 9.5, 3.1)], 32),
        ([6.8, 4.3, 4.6, 4.4, 3.6, 4.2, 9.0, 4.5, 9.1, 4.6], [(32, 3.6, 4.2), (64, 4.6, 4.4)], 64),
        ([9.0, 3.0, 3.0, 3.1, 2.5, 3.0, 9.0, 3.2, 9.5, 3.3], [(32, 2.5, 3.0), (64, 3.0, 3.1)], 96),
        ([9.0, 3.0, 9.1, 9.0, 9.2, 3.1, 9.3, 3.2], [(32, 9.0, 3.0), (64, 9.1, 3.2)], 32),
    ],
)
def test_what_took_longer_than_a_larger_batch_is_measured_again(
    spent_ms: list[float],
    found: list[tuple[int, float, float]],
    tokens: int,
    process: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One slow batch neither ends the measuring nor decides."""
    from kt_sglang.prompts import crossing

    own, spent = started(tokens=8), iter(spent_ms)
    monkeypatch.setattr(crossing, "_median_ms", lambda work, wait: next(spent))
    measured = crossing.measure(process.layers.weights[1], HIDDEN, own.device, lambda *batch: None, own._wait)
    assert measured[: len(found)] == found and next(spent, None) is None
    assert crossing.crossing(measured) == tokens


@pytest.mark.parametrize(
    ("largest", "sizes"), [(8192, 9), (2048, 7), (1000, [32, 64, 128, 256, 512, 1000]), (32, [32]), (24, [24])]
)
def test_nothing_larger_is_measured_than_sglang_computes_at_once(
    largest: int, sizes: int | list[int], process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start would wait for a batch that never comes."""
    from kt_sglang.prompts import crossing, prefill

    monkeypatch.setattr(crossing, "_median_ms", lambda work, wait: 2.0)
    own = prefill.start({"tokens": None}, torch.device("cpu"), largest)
    found = [tokens for tokens, _, _ in own.measured]
    assert found == (sizes if isinstance(sizes, list) else [*crossing.MEASURED_TOKENS[:sizes]])
    assert largest * 0.99 < (crossing.crossing([(largest // 2, 1.0, 2.0), (largest, 2.0, 1.99)]) or 0) <= largest


def test_a_typed_number_that_no_batch_reaches_is_refused(process: Any) -> None:
    from kt_sglang.prompts import prefill

    assert prefill.start({"tokens": 32}, torch.device("cpu"), 32).state == "proving"
    own = prefill.start({"tokens": 33}, torch.device("cpu"), 32)
    assert (own.state, own.why) == ("off", "a step takes at most 32 tokens (server.chunked_prefill_size)")


def test_what_has_no_room_stays_on_the_cpu(process: Any) -> None:
    own = started(tokens=8, bytes=1000)
    assert (own.state, own.why) == ("off", "kt.gpu_prefill_gib has no room for two experts")
    assert own.report()["buffer_bytes"] == 0


def test_the_buffers_are_those_of_the_plan(process: Any) -> None:
    one = process.cases[1].moe.packed_bytes // EXPERTS
    unpacked = 3 * HIDDEN * INNER * 2
    found = buffers(one, unpacked, EXPERTS)
    assert found == Buffers(4, 2, started(tokens=8).report()["buffer_bytes"])


@pytest.mark.parametrize(
    ("packed", "unpacked", "experts", "most", "found"),
    [
        (17 * MIB, 17 * MIB, 64, None, (9, 8)),
        (25 * MIB, 88 * MIB, 256, None, (6, 6)),
        (604 * MIB, 604 * MIB, 8, None, (1, 2)),
        (604 * MIB, 604 * MIB, 8, GIB, None),
        (17 * MIB, 17 * MIB, 64, 60 * MIB, (1, 2)),
        (17 * MIB, 17 * MIB, 64, 8 * GIB, (9, 8)),
        (17 * MIB, 17 * MIB, 64, GIB, (9, 5)),
        (5 * MIB, 17 * MIB, 64, None, (32, 2)),
        (17 * MIB, 17 * MIB, 1, None, (1, 2)),
        (17 * MIB, 17 * MIB, 2, None, (1, 2)),
    ],
)
def test_buffers_are_pieces_of_some_experts(
    packed: int, unpacked: int, experts: int, most: int | None, found: tuple[int, int] | None
) -> None:
    made = buffers(packed, unpacked, experts, most)
    assert (made and (made.experts, made.count)) == found
    if made:
        assert made.bytes == made.experts * (made.count * packed + unpacked)
