"""Our Prometheus metrics, next to SGLang's: what went through the CPU experts, where its time went, the state of the
run. Served by the launcher on a port of its own (server.metrics_port), where SGLang's metrics are passed on too.

METRICS lists all names; exports/grafana.py may use no others of ours. Imported only when metrics are served.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from kt_launch.machine.memory import read_held
from kt_launch.machine.processes import pids_below
from kt_launch.runs.state import READY, RunStateWriter, State
from kt_launch.watching.client import connect, url_of
from kt_launch.watching.own_port import answering
from kt_model.contract import REPORT
from kt_model.installed import PRODUCT, version_of
from kt_model.jsonfile import read_json_or_empty
from kt_model.plan import LaunchPlan

TIMEOUT_S = 5.0
GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
SCHEDULER, LAYER, PHASE = ("scheduler",), ("scheduler", "layer"), ("scheduler", "phase")

METRICS: Mapping[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], tuple[str, ...], str]] = {
    "kt_launch_info": (GAUGE, ("version", "model", "method"), "What is served: version, model, method."),
    "kt_launch_up": (GAUGE, (), "1 while the server is ready and answers."),
    "kt_launch_restarts_total": (COUNTER, (), "How often the server was restarted after a crash."),
    "kt_launch_start_phase_seconds": (
        GAUGE,
        ("phase",),
        "When each phase of the latest start began, in seconds after the start.",
    ),
    "kt_launch_adapters_loaded": (GAUGE, (), "Adapters that requests can name."),
    "kt_launch_adapter_slots_packed": (
        GAUGE,
        SCHEDULER,
        "Adapters packed for the CPU experts, in the layer that has the most.",
    ),
    "kt_launch_experts_packed_bytes": (GAUGE, SCHEDULER, "Memory of the packed routed experts."),
    "kt_launch_server_memory_bytes": (
        GAUGE,
        ("pages",),
        "Memory of the server's processes: kept, and with mapped files.",
    ),
    "kt_launch_expert_threads": (GAUGE, (), "Threads that compute experts."),
    "kt_launch_expert_tokens_total": (COUNTER, LAYER, "Tokens that went through the CPU experts, by layer."),
    "kt_launch_adapter_tokens_total": (COUNTER, LAYER, "Tokens of those that used an adapter, by layer."),
    "kt_launch_expert_batches_total": (COUNTER, LAYER, "Batches that went through the CPU experts, by layer."),
    "kt_launch_expert_phase_seconds_total": (COUNTER, PHASE, "Time in each phase of the experts, over all threads."),
    "kt_launch_expert_weight_bytes_total": (COUNTER, PHASE, "Bytes of expert weights read, by phase."),
}
"""Name -> type, label names, help."""

Sample = tuple[str, float, tuple[str, ...]]
"""A metric's name, its value, its label values."""


def run_samples(plan: LaunchPlan, state: State, timings: Mapping[str, float], answers: bool) -> Iterator[Sample]:
    """The launcher's own metrics."""
    labels = (version_of(PRODUCT) or "unknown", plan.value("model.name"), plan.value("kt.method"))
    yield "kt_launch_info", 1, labels
    yield "kt_launch_up", state.state == READY and answers, ()
    yield "kt_launch_restarts_total", state.restarts, ()
    yield "kt_launch_expert_threads", plan.value("kt.cpuinfer"), ()
    if state.server and state.server.alive:
        held = read_held([state.server.pid, *pids_below(state.server.pid)])
        yield "kt_launch_server_memory_bytes", held.kept_bytes, ("kept",)
        yield "kt_launch_server_memory_bytes", held.resident_bytes, ("resident",)
    for phase, seconds in timings.items():
        yield "kt_launch_start_phase_seconds", seconds, (phase,)


def scheduler_samples(reports: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """Metrics from the scheduler processes' reports (kt_model.contract.Report)."""
    for number, report in enumerate(reports):
        own, layers = str(number), report["layers"]
        yield "kt_launch_experts_packed_bytes", sum(layer["packed_bytes"] for layer in layers), (own,)
        packed = max((layer.get("adapter_slots", 0) for layer in layers), default=0)
        yield "kt_launch_adapter_slots_packed", packed, (own,)
        for layer in layers:
            labels = (own, str(layer["layer"]))
            yield "kt_launch_expert_tokens_total", layer["tokens"], labels
            yield "kt_launch_adapter_tokens_total", layer["adapter_tokens"], labels
            yield "kt_launch_expert_batches_total", layer["batches"], labels
        yield from _phase_samples(layers, own)


def _phase_samples(layers: Iterable[Mapping[str, Any]], own: str) -> Iterator[Sample]:
    """Sums over the layers; a kernel that does not profile reports nothing."""
    spent: Counter[str] = Counter()
    read: Counter[str] = Counter()
    for layer in layers:
        for phase, counts in (layer.get("phases") or {}).items():
            spent[phase] += counts["ns"]
            read[phase] += counts["bytes"]
    for phase in spent:
        yield "kt_launch_expert_phase_seconds_total", spent[phase] / 1e9, (own, phase)
        if read[phase]:
            yield "kt_launch_expert_weight_bytes_total", read[phase], (own, phase)


class RunCollector(Collector):
    """Our current metrics, and SGLang's if it exports them."""

    def __init__(self, plan: LaunchPlan, run_folder: Path, state_writer: RunStateWriter, client: httpx.Client) -> None:
        self._plan, self._run_folder, self._state_writer, self._client = plan, run_folder, state_writer, client

    def collect(self) -> Iterator[Metric]:
        reports, adapters, stock = self._ask_server()
        found = {name: family(name, text, labels=labels) for name, (family, labels, text) in METRICS.items()}
        timings = read_json_or_empty(self._run_folder / "timings.json")
        for name, value, labels in (
            *run_samples(self._plan, self._state_writer.state, timings, reports is not None),
            *scheduler_samples(reports or []),
            *([] if adapters is None else [("kt_launch_adapters_loaded", adapters, ())]),
        ):
            found[name].add_metric(labels, value)
        yield from (family for family in found.values() if family.samples)
        yield from text_string_to_metric_families(stock)

    def _ask_server(self) -> tuple[list[dict[str, Any]] | None, int | None, str]:
        """Reports of the schedulers, number of adapters, SGLang's own metrics; each is absent if the server does not
        answer."""
        if self._state_writer.state.state != READY:
            return None, None, ""
        try:
            states = self._client.get("/server_info").raise_for_status().json()["internal_states"]
            models = self._client.get("/v1/models").raise_for_status().json()["data"]
            stock = self._client.get("/metrics/", follow_redirects=True)
        except (httpx.HTTPError, ValueError, KeyError):
            return None, None, ""
        own = [state[REPORT] for state in states if state.get(REPORT)]
        reports = [report for each in own for report in (each, *each["others"])]
        return reports, sum(1 for model in models if model.get("parent")), stock.text if stock.is_success else ""


@contextlib.contextmanager
def exported(plan: LaunchPlan, run_folder: Path, state_writer: RunStateWriter, port: int) -> Iterator[None]:
    """Serves GET /metrics within the block; port 0 takes a free one. Raises LaunchError if the port cannot be used."""
    host, registry = plan.value("server.host"), CollectorRegistry()
    with connect(plan, TIMEOUT_S) as client:
        registry.register(RunCollector(plan, run_folder, state_writer, client))
        with answering("server.metrics_port", host, port, lambda: start_http_server(port, host, registry)) as server:
            url = f"{url_of(host, server.server_port)}/metrics"
            state_writer.exports_metrics(url)
            print(f"metrics: {url}", flush=True)
            yield
