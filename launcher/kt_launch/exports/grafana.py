"""The Grafana dashboard of our metrics and of SGLang's: a row of PANELS per panel, laid out from left to right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

WIDTH = 24
"""The number of Grafana's columns."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HERE = '{instance=~"$instance"}'


class Panel(NamedTuple):
    """queries: expression -> the line's name."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""
    kind: str = "timeseries"
    width: int = 12
    height: int = 8


def _rate(metric: str, where: str = HERE) -> str:
    return f"rate({metric}{where}[$__rate_interval])"


def _sum(metric: str, by: str = "instance", where: str = HERE) -> str:
    return f"sum by ({by}) ({_rate(metric, where)})"


def _latency(metric: str) -> dict[str, str]:
    """Quantiles of one of SGLang's histograms."""
    return {
        f"histogram_quantile({quantile}, {_sum(f'{metric}_bucket', 'instance, le')})": f"{quantile:.0%}"
        for quantile in (0.5, 0.9, 0.99)
    }


def _stat(title: str, query: str, name: str = "{{instance}}", unit: str = "none", width: int = 4) -> Panel:
    """The latest value, as a number."""
    return Panel(title, unit, {query: name}, kind="stat", width=width, height=4)


COMPUTING = _sum("kt_launch_expert_phase_seconds_total", where='{instance=~"$instance", phase!="wait"}')
THREADS = f"max by (instance) (kt_launch_expert_threads{HERE})"
PANELS = (
    _stat("Up", f"kt_launch_up{HERE}", unit="bool_on_off"),
    _stat("Restarts", f"kt_launch_restarts_total{HERE}"),
    _stat("Adapters that requests can name", f"kt_launch_adapters_loaded{HERE}"),
    _stat("Packed experts", f"sum by (instance) (kt_launch_experts_packed_bytes{HERE})", unit="bytes"),
    _stat("Served", f"kt_launch_info{HERE}", "{{model}}, {{method}}, {{version}}", width=8),
    Panel("Time to first token (SGLang)", "s", _latency("sglang:time_to_first_token_seconds")),
    Panel("Time between tokens (SGLang)", "s", _latency("sglang:inter_token_latency_seconds")),
    Panel(
        "Requests (SGLang)",
        "none",
        {f"sglang:num_running_reqs{HERE}": "running", f"sglang:num_queue_reqs{HERE}": "waiting"},
    ),
    Panel("Tokens generated (SGLang)", "ops", {_rate("sglang:generation_tokens_total"): "{{model_name}}"}),
    Panel(
        "KV cache in use (SGLang)",
        "percentunit",
        {f"max by (instance) (sglang:token_usage{HERE})": "{{instance}}"},
        "Share of the tokens that it can hold.",
    ),
    Panel(
        "Memory",
        "bytes",
        {
            f"max by (instance, pages) (kt_launch_server_memory_bytes{HERE})": "the server's processes, {{pages}}",
            f"sum by (instance) (kt_launch_experts_packed_bytes{HERE})": "experts on the CPU",
            f"sum by (instance) (sglang:weight_memory_usage_gb{HERE}) * 2^30": "weights, as SGLang measured",
            f"sum by (instance) (sglang:kv_cache_memory_usage_gb{HERE}) * 2^30": "KV cache (SGLang)",
        },
        "Kept are pages that the kernel cannot drop; resident are those of mapped files too.",
    ),
    Panel(
        "Tokens through the CPU experts",
        "ops",
        {
            f"max by (instance) ({_rate('kt_launch_expert_tokens_total')})": "all",
            f"max by (instance) ({_rate('kt_launch_adapter_tokens_total')})": "with an adapter",
        },
        "Per second; each token counts once, however many layers it passes.",
    ),
    Panel(
        "Tokens in a batch",
        "none",
        {f"{_sum('kt_launch_expert_tokens_total')} / {_sum('kt_launch_expert_batches_total')}": "mean"},
    ),
    Panel(
        "Where the experts' time goes",
        "percentunit",
        {
            f"{_sum('kt_launch_expert_phase_seconds_total', 'phase')}"
            f" / scalar(max(kt_launch_expert_threads{HERE}))": "{{phase}}"
        },
        "Share of all expert threads' time.",
    ),
    Panel(
        "Bandwidth of expert weights",
        "Bps",
        {f"{_sum('kt_launch_expert_weight_bytes_total')} / ({COMPUTING} / {THREADS})": "while computing"},
    ),
    Panel(
        "Adapters",
        "none",
        {
            f"max by (instance) (kt_launch_adapters_loaded{HERE})": "requests can name",
            f"max by (instance) (kt_launch_adapter_slots_packed{HERE})": "packed for the CPU experts",
            f"max by (instance) (sglang:lora_pool_slots_used{HERE})": "slots in use (SGLang)",
            f"max by (instance) (sglang:lora_pool_slots_total{HERE})": "slots (SGLang)",
        },
    ),
    Panel(
        "Latest start",
        "s",
        {f"kt_launch_start_phase_seconds{HERE}": "{{phase}}"},
        "When each phase began, in seconds after the start.",
        kind="bargauge",
    ),
)


def write_dashboard() -> str:
    """The dashboard as Grafana imports it."""
    data_source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    instance = {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": SOURCE,
        "query": "label_values(kt_launch_up, instance)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }
    dashboard = {
        "title": "kt-launch",
        "uid": "kt-launch",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "tags": ["kt-launch", "sglang"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "15s",
        "panels": list(_panels()),
        "templating": {"list": [data_source, instance]},
    }
    return json.dumps(dashboard, indent=1) + "\n"


def _panels() -> Iterator[dict[str, Any]]:
    """With their positions: a row is full when the next panel does not fit."""
    x = y = height = 0
    for number, panel in enumerate(PANELS, 1):
        if x + panel.width > WIDTH:
            x, y, height = 0, y + height, 0
        targets = [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": query, "legendFormat": name}
            for place, (query, name) in enumerate(panel.queries.items())
        ]
        yield {
            "id": number,
            "title": panel.title,
            "description": panel.description,
            "type": panel.kind,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
            "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
            "targets": targets,
        }
        x, height = x + panel.width, max(height, panel.height)
