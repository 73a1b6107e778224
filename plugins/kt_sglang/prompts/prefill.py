"""When a batch's experts are streamed to the GPU (streamed.py): from a certain number of tokens on (crossing.py), and
only what has been proven, in this process, to give the same results as kt_kernels.

Proven means: in every layer, for the base and for each adapter separately, some rows of the first batch that had them
were computed both ways. Until then, and permanently after the first difference, kt_kernels computes.

Shapes: T tokens, K top-k, H hidden size.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import kt_kernels
from kt_model.contract import BASE, GPU_PREFILL, NO_ADAPTER, GpuPrefillReport
from kt_model.methods import method_of
from kt_model.prefill_buffers import buffers
from kt_sglang.moe.layers import LAYERS
from kt_sglang.moe.transfer import HostBatch
from kt_sglang.prompts.crossing import MEASURED_TOKENS, Between, Times, crossing, measure
from kt_sglang.prompts.streamed import CannotStream, Counts, LayerSource, Streamer, register
from kt_sglang.prompts.unpacking import ROWS, padded, piece_bytes

logger = logging.getLogger(__name__)
CHECKED_ROWS = 32
LIMITS = {"bf16": 0.02, "int8": 0.05, "int4": 0.05}
"""Largest relative L2 difference of the two ways, by format. Both use the same weights; kt_kernels rounds activations
to bfloat16 or, with int8 and int4, to 8 bits per row. A wrong computation differs by about 1."""
EFFECT_LIMIT = 0.25
"""The same for an adapter's contribution, in addition to twice the base's difference on those rows."""
Both = tuple[torch.Tensor, torch.Tensor]
"""Some rows as streamed, and as kt_kernels computes them."""


@dataclass
class Prefill:
    """The instance of this process."""

    device: torch.device
    wanted: int | None = None
    """Tokens of a batch, as typed; None: measured."""
    largest: int | None = None
    """The most tokens that SGLang computes at once; None: any number."""
    state: str = "off"
    why: str = "kt.gpu_prefill_tokens is off"
    tokens: int | None = None
    streamer: Streamer | None = None
    sources: dict[int, LayerSource] = field(default_factory=dict)
    counts: dict[int, Counts] = field(default_factory=dict)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    """By BASE or SGLang's id of an adapter, and layer."""
    measured: list[Times] = field(default_factory=list)
    link_gb_s: float = 0.0
    between: Between = field(default_factory=Between)

    # Before the first batch

    def prepare(self, most_bytes: int | None) -> None:
        """Register the packed experts, allocate the buffers, measure; all layers have been loaded. A failure leaves it
        off."""
        try:
            if self.wanted and self.largest and self.wanted > self.largest:
                raise CannotStream(f"a step takes at most {self.largest} tokens (server.chunked_prefill_size)")
            self._find_sources()
            self._make_buffers(most_bytes)
            self.state, self.why = "proving", "nothing has been compared yet"
            self.tokens = self.wanted
            if self.wanted is None:
                self._measure()
        except CannotStream as failure:
            self._turn_off(str(failure))
        except Exception as failure:  # any failure of the GPU or its compiler: kt_kernels computes instead
            self._turn_off(f"{type(failure).__name__}: {failure}")

    def _find_sources(self) -> None:
        before = None
        for layer, weights in sorted(LAYERS.weights.items()):
            if not weights.is_complete:
                continue
            number_format = method_of(weights.moe.method).name
            source = LayerSource.of(layer, weights.moe, number_format)
            if weights.placement.resident:
                source.in_pools = weights.placement.on_cpu
            if self.device.type == "cuda":
                for packed in source.packed:
                    register(packed, read_only=True)
            self.sources[layer], self.counts[layer] = source, Counts()
            if before is not None:
                before.following = source
            before = source
        if before is None:
            raise CannotStream("no layer has experts in kt_kernels")
        if len(self.sources) > 1:
            before.following, before.is_last = next(iter(self.sources.values())), True

    def _make_buffers(self, most_bytes: int | None) -> None:
        first = next(iter(self.sources.values()))
        if any(source.shape != first.shape for source in self.sources.values()):
            raise CannotStream("the layers' experts differ in size")
        unpacked = (2 * padded(first.hidden) + padded(first.hidden, ROWS)) * padded(first.intermediate) * 2
        found = buffers(piece_bytes(first.shards, 1), unpacked, first.experts, most_bytes)
        if found is None:
            raise CannotStream("kt.gpu_prefill_gib has no room for two experts")
        self.streamer = Streamer(first, found.experts, found.count, self.device)

    # Which way is faster

    def _measure(self) -> None:
        """Both ways, in the first layer."""
        source = next(iter(self.sources.values()))
        following, source.following = source.following, None
        streamed = partial(self._streamed, source)
        weights = LAYERS.weights[source.layer]
        largest = self.largest or MEASURED_TOKENS[-1]
        self.measured.extend(measure(weights, source.hidden, self.device, streamed, self._wait, largest))
        source.following = following
        self.link_gb_s = round(sum(packed.nbytes for packed in source.packed) / self.measured[-1][2] / 1e6, 1)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # A batch

    def takes(self, layer: int, tokens: int, slots_T: torch.Tensor | None) -> bool:
        """Whether `run` should compute this batch."""
        if self.state == "proving":
            self.between.begin(layer)
        if self.state != "on" or self.tokens is None or tokens < self.tokens or layer not in self.sources:
            return False
        return slots_T is None or all(self._shown(adapter) for adapter in LAYERS.slots.values())

    def run(
        self,
        layer: int,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        slots_T: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Σ_k weight·expert(x) over the layer's experts in kt_kernels, whose numbers the ids are. None if the GPU lacks
        memory for it; then this way is switched off."""
        try:
            return self._streamed(self.sources[layer], x_TH, ids_TK, weights_TK, slots_T, self.counts[layer])
        except torch.OutOfMemoryError as failure:
            self._turn_off(f"no room for a batch of {len(x_TH)} tokens: {failure}")
            return None

    def _streamed(self, source: LayerSource, *batch: Any) -> torch.Tensor:
        assert self.streamer is not None
        self._take_pools(source)
        return self.streamer.run(source, *batch)

    def _take_pools(self, source: LayerSource) -> None:
        """SGLang creates them after the model is loaded."""
        layer = LAYERS.records[source.layer].lora if source.layer in LAYERS.records else None
        pools = layer.pools if layer is not None and not source.pools else ()
        if self.device.type == "cuda":
            for pool in pools:
                register(pool, read_only=False)
        source.pools = pools or source.pools

    # Proof

    def check(self, layer: int, moe: kt_kernels.MoE, x_TH: torch.Tensor, host: HostBatch) -> None:
        """Compare the parts of this batch, computed by kt_kernels, that no earlier batch had."""
        self._check(layer, moe, x_TH, host)
        if self.state == "proving":
            self.between.end(self.sources.get(layer))

    def _check(self, layer: int, moe: kt_kernels.MoE, x_TH: torch.Tensor, host: HostBatch) -> None:
        if self.state == "off" or layer not in self.sources or not self._anything_new(layer):
            return
        slots = host.slots
        for slot in set(slots):
            name = BASE if slot == NO_ADAPTER else LAYERS.slots.get(slot)
            if name is None or layer in self.errors.get(name, {}) or self.state == "off":
                continue
            rows = [row for row, its in enumerate(slots) if its == slot][:CHECKED_ROWS]
            if rows := [row for row in rows if host.x_TH[row].isfinite().all()]:
                self._compare_if_it_can(layer, moe, name, rows, x_TH, host)
        if self.state == "proving" and self._shown(BASE):
            self._turn_on()

    def _compare_if_it_can(self, *what: Any) -> None:
        try:
            self._compare(*what)
        except Exception as failure:  # as in prepare
            self._turn_off(f"{type(failure).__name__}: {failure}")

    def _anything_new(self, layer: int) -> bool:
        names = {BASE, *LAYERS.slots.values()}
        return any(layer not in self.errors.get(name, {}) for name in names)

    def _compare(
        self,
        layer: int,
        moe: kt_kernels.MoE,
        name: str,
        rows: Sequence[int],
        x_TH: torch.Tensor,
        host: HostBatch,
    ) -> None:
        """Rows that are not finite in kt_kernels either show nothing."""
        x, weights = host.x_TH[rows], host.weights_TK[rows]
        ids = some_chosen(host.ids_TK[rows], moe.num_experts)
        slots = None if host.slots_T is None else host.slots_T[rows]

        def both(slots: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            at = torch.tensor(rows, device=x_TH.device)
            batch = (None if each is None else each.to(x_TH.device) for each in (ids, weights, slots))
            streamed = self._streamed(self.sources[layer], x_TH[at], *batch)
            out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
            moe.forward(x, ids, weights, slots, out)
            return streamed.float().cpu(), out

        base = both(None)
        adapted = both(slots) if name != BASE else None
        if all(found[1].isfinite().all() for found in (base, adapted) if found):
            self._judge(layer, name, LIMITS[method_of(moe.method).name], base, adapted)

    def _judge(self, layer: int, name: str, limit: float, base: Both, adapted: Both | None) -> None:
        (streamed, expected), size = base, float(base[1].norm())
        difference = float((streamed - expected).norm())
        self._note(layer, name, difference / size if size else 0.0, limit)
        if adapted and self.state != "off":
            effect = adapted[1] - expected
            wrong = float(((adapted[0] - streamed) - effect).norm())
            if not wrong <= EFFECT_LIMIT * float(effect.norm()) + 2 * difference:
                self._turn_off(
                    f"layer {layer}: what adapter {name} changes differs from kt_kernels by {wrong:.2g} of "
                    f"{float(effect.norm()):.2g}"
                )

    def _note(self, layer: int, name: str, error: float, limit: float) -> None:
        if name not in self.errors:
            loaded = {BASE, *LAYERS.slots.values(), *LAYERS.checked}
            self.errors = {each: found for each, found in self.errors.items() if each in loaded}
        self.errors.setdefault(name, {})[layer] = error
        if not error <= limit:
            self._turn_off(
                f"layer {layer} differs from kt_kernels by {error:.2g} (relative L2), expected at most {limit:g}"
            )

    def _shown(self, name: str) -> bool:
        return len(self.errors.get(name, ())) == len(self.sources)

    def _turn_on(self) -> None:
        if self.wanted is None:
            self.tokens = crossing([(count, cpu + self.between.ms, gpu) for count, cpu, gpu in self.measured])
        if self.tokens is None:
            self._turn_off(f"the CPU is faster at {self.measured[-1][0]} tokens still")
            return
        self.state, self.why = "on", "typed" if self.wanted is not None else self._told(self.tokens)
        logger.info("gpu prefill: on from %d tokens: %s", self.tokens, self.why)

    def _told(self, tokens: int) -> str:
        rows = self.measured
        around = [each for each in rows if each[0] <= tokens][-1:] + [each for each in rows if each[0] > tokens][:1]
        figures = ", ".join(f"{count} tokens {cpu:.1f} and {gpu:.1f} ms" for count, cpu, gpu in around)
        meanwhile = f"{self.between.ms:.1f} ms between two layers, in which kt_kernels waits and experts come"
        return f"measured, a layer in kt_kernels and on the card: {figures}; {meanwhile}"

    def _turn_off(self, why: str) -> None:
        self.state, self.why = "off", why
        logger.warning("gpu prefill: off: %s", why)
        if self.streamer is not None:
            with suppress(RuntimeError):  # a GPU that no longer works; its next user gets the error
                self._wait()  # copies into the buffers may be in flight
            self.streamer = None

    def report(self) -> GpuPrefillReport:
        """For the launcher."""
        counts = self.counts.values()
        return {
            "state": self.state,
            "why": self.why,
            "tokens": self.tokens,
            "measured": self.measured,
            "between_ms": self.between.ms,
            "link_gb_s": self.link_gb_s,
            "errors": {name: max(found.values()) for name, found in self.errors.items() if found},
            "buffer_bytes": self.streamer.bytes if self.streamer else 0,
            "tokens_ran": min((each.tokens for each in counts), default=0),
            "adapter_tokens_ran": min((each.adapter_tokens for each in counts), default=0),
            "bytes": sum(each.bytes for each in counts),
        }


def some_chosen(ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """The ids; where none of them is of these experts, others that are, since what is used rarely is to be compared
    before it is used, too: which experts the router chose makes no difference to a comparison."""
    if bool((ids_TK >= 0).any()):
        return ids_TK
    rows, top_k = ids_TK.shape
    row_T, choice_K = (torch.arange(count, device=ids_TK.device) for count in (rows, top_k))
    return torch.where(choice_K < experts, (row_T[:, None] + choice_K) % experts, -1).to(ids_TK.dtype)


_of_process: list[Prefill] = []


def prefill() -> Prefill | None:
    """The instance of this process, if there is one."""
    return _of_process[-1] if _of_process else None


def after_load_model(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `ModelRunner.load_model`: SGLang sizes its KV cache by what the buffers leave."""
    asked = os.environ.get(GPU_PREFILL)
    if asked and torch.cuda.is_available() and LAYERS.weights:
        start(json.loads(asked), torch.device("cuda", torch.cuda.current_device()), most_at_once())
    return result


def most_at_once() -> int | None:
    """The most tokens of a step that reads prompts, as SGLang resolved it; None if it cuts none."""
    from sglang.srt.runtime_context import get_server_args

    size = get_server_args().chunked_prefill_size
    return size if size and size > 0 else None


def start(asked: dict[str, Any], device: torch.device, largest: int | None = None) -> Prefill:
    """asked: `tokens`, a number or None, and `bytes` of all buffers or None."""
    own = Prefill(device, wanted=asked.get("tokens"), largest=largest)
    _of_process[:] = [own]
    own.prepare(asked.get("bytes"))
    return own
