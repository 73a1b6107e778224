"""Captured steps on a real stream: a graph of several layers, replayed, gives to the bit what the layers give."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

import kt_kernels

if TYPE_CHECKING:
    from kt_sglang.decode.handover import Handover

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
T, K, E, H, I, LAYERS = 8, 2, 4, 256, 128, 3  # noqa: E741


def layers() -> list[kt_kernels.MoE]:
    pool, made = kt_kernels.ThreadPool(4), []
    for _ in range(LAYERS):
        moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, pool=pool)
        for expert in range(E):
            moe.load_expert(expert, *(torch.randn(shape).bfloat16() / 16 for shape in ((I, H), (I, H), (H, I))))
        made.append(moe)
    return made


def adapter() -> kt_kernels.Adapter:
    shapes = ((E, 4, H), (E, I, 4), (E, 4, H), (E, I, 4), (E, 4, I), (E, H, 4))
    return kt_kernels.Adapter(*(torch.randn(shape).bfloat16() / 4 for shape in shapes))


class Captured:
    """x + layer(x), three times, in one graph; `ids_TK` and `slots_T` lie where the graph reads them."""

    def __init__(self, way: Handover) -> None:
        from kt_sglang.decode.captured import CapturedSteps

        self.layers = layers()
        self.records = [kt_kernels.HostRecord() for _ in self.layers]
        self.steps = CapturedSteps(way)
        self.steps.prepare(T, K, H)
        self.x_TH = torch.randn(T, H, device="cuda").bfloat16()
        self.ids_TK = torch.randint(0, E, (T, K), device="cuda", dtype=torch.int32)
        self.weights_TK = torch.rand(T, K, device="cuda")
        self.slots_T = torch.full((T,), -1, device="cuda", dtype=torch.int32)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            out = self.x_TH
            for moe, record in zip(self.layers, self.records, strict=True):
                out = out + self.steps.run(moe, record, out, self.ids_TK, self.weights_TK, self.slots_T)
            self.out_TH = out

    def replay(self, rows: int) -> torch.Tensor:
        self.steps.set_real_rows(rows, "cuda")
        self.graph.replay()
        torch.cuda.synchronize()
        return self.out_TH.clone()

    def eager(self, rows: int) -> torch.Tensor:
        out = self.x_TH
        for moe in self.layers:
            host = out[:rows].cpu()
            result = torch.zeros(T, H, dtype=torch.bfloat16)
            batch = (self.ids_TK[:rows].cpu(), self.weights_TK[:rows].cpu(), self.slots_T[:rows].cpu())
            moe.forward(host, *batch, result[:rows])
            out = out + result.cuda()
        return out


@pytest.fixture(scope="module", params=["mailbox", "host functions"])
def captured(request: pytest.FixtureRequest) -> Captured:
    from kt_sglang.decode.handover import HostFunctions, Mailbox, launch_host_function, on_cuda

    way = on_cuda() if request.param == "mailbox" else HostFunctions(launch_host_function)
    assert isinstance(way, Mailbox) == (request.param == "mailbox")
    return Captured(way)


def test_replays_read_new_inputs_and_leave_padding_alone(captured: Captured) -> None:
    for rows in (T, 5, 1, T):
        captured.x_TH.normal_()
        captured.ids_TK.random_(0, E)
        captured.weights_TK.uniform_()
        expected = captured.eager(rows)
        assert torch.equal(captured.replay(rows), expected)
    assert [record.calls for record in captured.records] == [4] * LAYERS


def test_adapters_swapped_between_replays_act_in_the_next(captured: Captured) -> None:
    seen = [captured.replay(T)]
    for moe in captured.layers:
        moe.set_adapter(0, adapter())
    captured.slots_T[1::2] = 0
    seen.append(captured.replay(T))
    assert torch.equal(seen[-1], captured.eager(T))
    assert torch.equal(seen[-1][0::2], seen[0][0::2]) and not torch.equal(seen[-1][1], seen[0][1])
    for moe in captured.layers:
        moe.set_adapter(0, adapter())
    seen.append(captured.replay(T))
    assert torch.equal(seen[-1], captured.eager(T)) and not torch.equal(seen[-1], seen[-2])
    captured.slots_T.fill_(-1)
    assert torch.equal(captured.replay(T), seen[0])


def test_sizes_that_no_vector_divides_come_through_whole() -> None:
    from kt_sglang.decode.captured import CapturedSteps
    from kt_sglang.decode.handover import on_cuda

    tokens, hidden, inner = 3, 34, 20
    moe = kt_kernels.MoE(num_experts=E, hidden_size=hidden, intermediate_size=inner, pool=kt_kernels.ThreadPool(2))
    for expert in range(E):
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        moe.load_expert(expert, *(torch.randn(shape).bfloat16() / 4 for shape in shapes))
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids = torch.randint(0, E, (tokens, K), device="cuda")
    weights, steps = torch.rand(tokens, K, device="cuda"), CapturedSteps(on_cuda())
    steps.prepare(tokens, K, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = steps.run(moe, kt_kernels.HostRecord(), x, ids, weights, None)
    steps.set_real_rows(tokens, "cuda")
    graph.replay()
    expected = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    moe.forward(x.cpu(), ids.cpu().int(), weights.cpu(), None, expected)
    assert torch.equal(out.cpu(), expected)


def test_a_thread_that_ended_lets_the_device_go_on() -> None:
    """A call that is not there ends the thread: what waits, and what is replayed later, is NaN and no hang."""
    from kt_sglang.decode.handover import Mailbox, launch_kernel

    way = Mailbox(launch_kernel)
    captured = Captured(way)
    way.words[kt_kernels.Mailbox.REQUEST] = 99
    while not way.words[kt_kernels.Mailbox.CLOSED]:
        time.sleep(1e-3)
    assert captured.replay(T).isnan().all()
    assert all("call 99 was asked for" in str(record.failure) for record in captured.records)


def test_a_failure_in_a_replay_is_told_and_no_number(captured: Captured) -> None:
    captured.slots_T.fill_(9)
    assert captured.replay(T).isnan().all()
    assert all("adapter_slots[0]" in str(record.failure) for record in captured.records)
