"""A captured step without a GPU: what a graph would replay is called from a thread that stands for the stream."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kt_kernels

T, K, E, H, I, R = 4, 2, 4, 64, 48, 3  # noqa: E741


@pytest.fixture(scope="module", autouse=True)
def importable_sglang() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()


class Stream:
    """Takes host functions as a stream does, runs them in order on a thread of its own, and runs them again."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, int]] = []

    def launch(self, function: int, argument: int) -> None:
        self.captured.append((function, argument))

    def replay(self) -> None:
        def run() -> None:
            for function, argument in self.captured:
                ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


def captured_steps(stream: Stream) -> Any:
    from kt_sglang.decode.captured import CapturedSteps
    from kt_sglang.decode.handover import HostFunctions

    return CapturedSteps(HostFunctions(stream.launch), pinned=False)


def layer(seed: int) -> kt_kernels.MoE:
    generator = torch.Generator().manual_seed(seed)
    pool = kt_kernels.ThreadPool(1)
    moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, pool=pool)
    for expert in range(E):
        parts = (torch.randn(shape, generator=generator).bfloat16() / 8 for shape in ((I, H), (I, H), (H, I)))
        moe.load_expert(expert, *parts)
    return moe


def batch(tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    return torch.randn(tokens, H).bfloat16(), ids, torch.rand(tokens, K)


def direct(moe: kt_kernels.MoE, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), H, dtype=torch.bfloat16)
    moe.forward(x, ids, weights, None, out)
    return out


def test_layers_share_buffers_of_one_size_and_replays_read_them_anew() -> None:
    stream, moe, record = Stream(), layer(1), kt_kernels.HostRecord()
    steps = captured_steps(stream)
    steps.prepare(T, K, H)
    steps.prepare(T, K, H)
    x, ids, weights = batch()
    steps.run(moe, record, x, ids, weights, None)
    host = steps._buffers[(T, K, H)]
    stream.replay()
    assert torch.equal(host.out_TH, direct(moe, x, ids, weights))
    x, ids, weights = batch()
    for buffer, values in ((host.x_TH, x), (host.ids_TK, ids), (host.weights_TK, weights)):
        buffer.copy_(values)
    stream.replay()
    assert torch.equal(host.out_TH, direct(moe, x, ids, weights))
    assert (len(steps._buffers), record.calls) == (1, 2)


def test_a_size_that_was_not_prepared_is_not_captured() -> None:

    steps = captured_steps(Stream())
    with pytest.raises(KeyError):
        steps.run(layer(1), kt_kernels.HostRecord(), *batch(), None)


def test_rows_beyond_the_batch_are_padding_until_they_are_real_again() -> None:
    from kt_sglang.decode.captured import ALL_ROWS

    stream, moe, record = Stream(), layer(1), kt_kernels.HostRecord()
    steps = captured_steps(stream)
    steps.set_real_rows(2, "cpu")  # nothing was captured: nothing to say
    steps.prepare(T, K, H)
    x, ids, weights = batch()
    steps.run(moe, record, x, ids, weights, None)
    out, expected = steps._buffers[(T, K, H)].out_TH, direct(moe, x, ids, weights)
    for count, real in ((3, 3), (1, 1), (T + 7, T), (0, 0), (ALL_ROWS, T)):
        steps.set_real_rows(count, "cpu")
        stream.replay()
        assert torch.equal(out[:real], expected[:real]) and not out[real:].any()
    assert record.tokens == 3 + 1 + T + 0 + T


class Event:
    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def runner(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"require_gathered_buffer": False, "captured_req_width": 1, "device": "cpu", **changes})


@pytest.mark.parametrize(
    ("changes", "spec_info", "expected"),
    [({}, None, [3, "all"]), ({"require_gathered_buffer": True}, None, ["all", "all"]), ({}, object(), ["all", "all"])],
)
def test_a_replay_tells_its_real_rows_and_takes_them_back(
    changes: dict[str, Any], spec_info: object, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_sglang.decode import captured

    message: list[Any] = []
    steps = SimpleNamespace(
        set_real_rows=lambda count, device: message.append("all" if count == captured.ALL_ROWS else count)
    )
    monkeypatch.setattr(captured, "steps", lambda: steps)
    forward_batch = SimpleNamespace(batch_size=3, spec_info=spec_info)
    answer = captured.around_execute(lambda *_: "result", runner(**changes), forward_batch)
    assert (answer, message) == ("result", expected)


def test_a_failed_step_stops_the_scheduler_before_its_tokens_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from kt_sglang.decode import captured
    from kt_sglang.moe import layers

    monkeypatch.setattr(layers.LAYERS, "records", {})
    stream, record = Stream(), layers.LayerRecord(7)
    steps = captured_steps(stream)
    steps.prepare(T, K, H)
    moe = layer(1)
    x, ids, weights = batch()
    steps.run(moe, record.host, x, ids, weights, torch.full((T,), -1))
    stream.replay()
    sent: list[str] = []
    process = hooked(captured.before_process_batch_result_decode, lambda *_: sent.append("token"))
    process(None, None, SimpleNamespace(copy_done=Event()))
    assert sent == ["token"] and record.as_dict()["replayed"] == 1 == record.as_dict()["batches"]

    steps._buffers[(T, K, H)].slots_T[2] = 5
    stream.replay()
    event = Event()
    with pytest.raises(RuntimeError, match=r"layer 7: kt_kernels failed in a replayed step: adapter_slots\[2\]"):
        process(None, None, SimpleNamespace(copy_done=event))
    assert event.waited and sent == ["token"]
    with pytest.raises(RuntimeError, match="layer 7"):
        captured.around_execute(lambda *_: sent.append("step"), runner(), SimpleNamespace())
    assert sent == ["token"]


def test_a_prompt_is_waited_for_before_sglang_waits_busily() -> None:
    from kt_sglang.decode.captured import before_process_batch_result_prefill

    event = Event()
    seen: list[bool] = []
    process = hooked(before_process_batch_result_prefill, lambda *_: seen.append(event.waited))
    process(None, None, SimpleNamespace(copy_done=None))
    process(None, None, SimpleNamespace(copy_done=event))
    assert seen == [False, True]


def hooked(hook: Callable[..., None], original: Callable[..., None]) -> Callable[..., None]:
    """The original with a BEFORE hook, as SGLang puts it there."""
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    wrapped: Callable[..., None] = _wrap_fn(original, hook, HookType.BEFORE)
    return wrapped


class Wrapper:
    """FusedMoEWithLoRA as far as slots go."""

    def __new__(cls) -> Any:
        from kt_sglang.adapters.lora import FusedMoEWithLoRA
        from kt_sglang.moe.placement import Placement

        made = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
        torch.nn.Module.__init__(made)
        made._packed_slots = set()
        made.forgotten = []
        method: Any = SimpleNamespace(
            weights=SimpleNamespace(moe=layer(1), placement=Placement(E)),
            resident=SimpleNamespace(adapters=None),
            record=SimpleNamespace(forget_slots=made.forgotten.append),
        )
        made.experts_method = method
        sizes = {
            "gate_up_lora_a": (2 * R, H),
            "gate_up_lora_b": (2 * I, R),
            "down_lora_a": (R, I),
            "down_lora_b": (H, R),
        }
        for name, shape in sizes.items():
            setattr(made, f"{name}_weights", torch.randn(2, E, *shape).bfloat16() / 4)
        return made


def test_a_slot_is_packed_when_its_content_changes_and_emptied_with_its_adapter() -> None:
    from kt_sglang.adapters.lora import around_notify_lora_slots_updated

    module, message = Wrapper(), []
    slots = {"west": 1}
    manager = SimpleNamespace(
        memory_pool=SimpleNamespace(uid_to_buffer_id={None: 0, **slots}),
        loras={"west": SimpleNamespace(config=SimpleNamespace(r=R))},
        lora_modules=[{"experts": module, "q_proj": object()}],
    )
    around_notify_lora_slots_updated(lambda _, ids: message.append(ids), manager, {0, 1})
    assert message == [{0, 1}] == module.forgotten and module.packed_slots == 1
    x, ids, weights = batch()
    moe, out = module.experts_method.weights.moe, torch.empty(T, H, dtype=torch.bfloat16)
    moe.forward(x, ids, weights, torch.ones(T, dtype=torch.int32), out)
    assert not torch.equal(out, direct(moe, x, ids, weights))
    with pytest.raises(ValueError, match="slot 0"):
        moe.forward(x, ids, weights, torch.zeros(T, dtype=torch.int32), out)

    del manager.memory_pool.uid_to_buffer_id["west"], manager.loras["west"]
    around_notify_lora_slots_updated(lambda *_: None, manager, {1})
    assert module.packed_slots == 0
    with pytest.raises(ValueError, match="slot 1"):
        moe.forward(x, ids, weights, torch.ones(T, dtype=torch.int32), out)


def test_pools_of_experts_lie_in_host_memory_and_others_where_they_were() -> None:
    from kt_sglang.adapters.lora import around_init_buffers

    made: list[torch.Tensor] = []

    def init_buffers(pool: Any, base_model: Any) -> None:
        made.append(torch.zeros((2, E, R, H), dtype=torch.bfloat16, device="meta"))
        made.append(torch.zeros((2, R, H), dtype=torch.bfloat16, device="meta"))

    around_init_buffers(init_buffers, SimpleNamespace(moe_tp_rank=0, moe_tp_size=1), torch.nn.Identity())
    assert [(each.device.type, each.dtype) for each in made] == [("cpu", torch.bfloat16), ("meta", torch.bfloat16)]
    assert torch.zeros((1, 1, 1, 1), device="meta").is_meta


@pytest.mark.parametrize(
    ("tp_experts", "rank", "part"),
    [("split", 0, (0, 2)), ("split", 1, (1, 2)), ("rank0", 0, (0, 1)), ("rank0", 1, (1, 2))],
)
def test_pools_are_as_wide_as_the_ranks_experts(
    tp_experts: str, rank: int, part: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kt_sglang.adapters.lora import around_init_buffers

    monkeypatch.setenv("KT_LAUNCH_TP_EXPERTS", tp_experts)
    found: list[tuple[int, int]] = []

    def init_buffers(pool: Any, base_model: Any) -> None:
        found.append((pool.moe_tp_rank, pool.moe_tp_size))

    around_init_buffers(init_buffers, SimpleNamespace(moe_tp_rank=rank, moe_tp_size=2), torch.nn.Identity())
    assert found == [part]
