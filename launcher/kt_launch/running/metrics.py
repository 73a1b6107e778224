"""Prometheus metrics of our own, next to SGLang's: what went through the CPU experts, where its time went, how the run
fares. Served by the launcher on a port of its own (server.metrics_port); SGLang's metrics are passed on there too.

METRICS is the list of all names; dashboard.json may name no other of ours.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx

from kt_launch.machine.installed import version
from kt_launch.running.client import connect, url_of
from kt_launch.running.state import READY, Life, State
from kt_model.errors import LaunchError
from kt_model.plan import LaunchPlan

TIMEOUT_S = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DASHBOARD = Path(__file__).with_name("dashboard.json")

METRICS: Mapping[str, tuple[str, str]] = {
    "kt_launch_info": ("gauge", "What is served: version, model, method, instruction set."),
    "kt_launch_up": ("gauge", "1 while the server is ready and answers."),
    "kt_launch_restarts_total": ("counter", "Times the server was started again after a crash."),
    "kt_launch_start_phase_seconds": (
        "gauge",
        "When each phase of the latest start began, in seconds after its begin.",
    ),
    "kt_launch_adapters_loaded": ("gauge", "Adapters that requests can name."),
    "kt_launch_adapter_slots_packed": ("gauge", "Adapters packed for the CPU experts, of the layer with most."),
    "kt_launch_experts_packed_bytes": ("gauge", "Memory of the packed routed experts."),
    "kt_launch_expert_threads": ("gauge", "Threads that compute experts."),
    "kt_launch_expert_tokens_total": ("counter", "Tokens that went through the CPU experts, by layer."),
    "kt_launch_adapter_tokens_total": ("counter", "Tokens of those that used an adapter, by layer."),
    "kt_launch_expert_batches_total": ("counter", "Batches that went through the CPU experts, by layer."),
    "kt_launch_expert_phase_seconds_total": ("counter", "Time in each phase of the experts, summed over threads."),
    "kt_launch_expert_weight_bytes_total": ("counter", "Bytes of expert weights read, by phase."),
}


@dataclass(frozen=True)
class Sample:
    """One line of the exposition."""

    name: str
    value: float
    labels: Mapping[str, str]

    def __str__(self) -> str:
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in self.labels.items())
        return f"{self.name}{{{labels}}} {self.value!r}" if labels else f"{self.name} {self.value!r}"


def exposition(samples: Iterable[Sample]) -> str:
    """Prometheus's text format, every metric with its help and type."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    lines = []
    for name, (kind, help_text) in METRICS.items():
        if name in by_name:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *map(str, by_name[name])]
    return "\n".join(lines) + "\n"


def run_samples(plan: LaunchPlan, state: State, timings: Mapping[str, float], answers: bool) -> Iterator[Sample]:
    """What the launcher itself knows."""
    labels = {"version": version().rpartition(" ")[2], "model": plan.value("model.name")}
    yield Sample("kt_launch_info", 1, labels | {"method": plan.value("kt.method")})
    yield Sample("kt_launch_up", float(state.state == READY and answers), {})
    yield Sample("kt_launch_restarts_total", state.restarts, {})
    yield Sample("kt_launch_expert_threads", plan.value("kt.cpuinfer"), {})
    for phase, seconds in timings.items():
        yield Sample("kt_launch_start_phase_seconds", seconds, {"phase": phase})


def scheduler_samples(reports: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """What the scheduler processes report (kt_sglang.proof.report)."""
    for number, report in enumerate(reports):
        own, layers = {"scheduler": str(number)}, report["layers"]
        yield Sample("kt_launch_experts_packed_bytes", sum(layer["packed_bytes"] for layer in layers), own)
        packed = max((layer.get("adapter_slots", 0) for layer in layers), default=0)
        yield Sample("kt_launch_adapter_slots_packed", packed, own)
        for layer in layers:
            labels = own | {"layer": str(layer["layer"])}
            yield Sample("kt_launch_expert_tokens_total", layer["tokens"], labels)
            yield Sample("kt_launch_adapter_tokens_total", layer["adapter_tokens"], labels)
            yield Sample("kt_launch_expert_batches_total", layer["batches"], labels)
        yield from _phase_samples(layers, own)


def _phase_samples(layers: Iterable[Mapping[str, Any]], own: Mapping[str, str]) -> Iterator[Sample]:
    """Sums over the layers; a kernel that does not profile reports nothing."""
    nanoseconds: dict[str, int] = {}
    read_bytes: dict[str, int] = {}
    for layer in layers:
        for phase, counts in (layer.get("phases") or {}).items():
            nanoseconds[phase] = nanoseconds.get(phase, 0) + counts["ns"]
            read_bytes[phase] = read_bytes.get(phase, 0) + counts["bytes"]
    for phase, spent in nanoseconds.items():
        yield Sample("kt_launch_expert_phase_seconds_total", spent / 1e9, {**own, "phase": phase})
    for phase, count in read_bytes.items():
        if count:
            yield Sample("kt_launch_expert_weight_bytes_total", count, {**own, "phase": phase})


class Exporter:
    """Answers GET /metrics while the run lives; does nothing without server.metrics_port."""

    def __init__(self, plan: LaunchPlan, run_folder: Path, life: Life) -> None:
        self._plan, self._run_folder, self._life = plan, run_folder, life
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        port = self._plan.config["server"].get("metrics_port")
        if port is not None:
            self._listen(int(port))
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._client.close()

    def page(self) -> str:
        """Our metrics, and SGLang's where it offers them."""
        reports, adapters, stock = self._ask_server()
        samples = [
            *run_samples(self._plan, self._life.state, _read(self._run_folder / "timings.json"), reports is not None),
            *scheduler_samples(reports or []),
        ]
        if adapters is not None:
            samples.append(Sample("kt_launch_adapters_loaded", adapters, {}))
        return exposition(samples) + stock

    def _listen(self, port: int) -> None:
        self._client = connect(self._plan, TIMEOUT_S)
        host = self._plan.value("server.host")
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(self))
        except OSError as failure:
            problem = f"{port} on {host} cannot be used: {failure.strerror}"
            raise LaunchError(
                "server.metrics_port", problem, "Type server.metrics_port=0 for a free port."
            ) from failure
        url = f"{url_of(host, self._server.server_port)}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        self._life.exports_metrics(url)
        print(f"metrics: {url}", flush=True)

    def _ask_server(self) -> tuple[list[dict[str, Any]] | None, int | None, str]:
        """Reports of the schedulers, number of adapters, SGLang's own metrics; what does not answer is absent."""
        if self._life.state.state != READY:
            return None, None, ""
        try:
            states = self._client.get("/server_info").raise_for_status().json()["internal_states"]
            models = self._client.get("/v1/models").raise_for_status().json()["data"]
            stock = self._client.get("/metrics/", follow_redirects=True)
        except (httpx.HTTPError, ValueError, KeyError):
            return None, None, ""
        reports = [state["kt_launch"] for state in states if state.get("kt_launch")]
        return reports, sum(1 for model in models if model.get("parent")), stock.text if stock.is_success else ""


def _handler(exporter: Exporter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = exporter.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are not worth a line."""

    return Handler


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _read(file: Path) -> dict[str, float]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
