"""The headline numbers of a bench in one flat dictionary, by which rows are compared and optimized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summarize(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Latency of a single user of the base model, the best throughput of any target, and the worst quality of any."""
    loads, quality = record.get("loads") or [], record.get("quality") or []
    memory = record.get("memory") or {}
    alone = min(
        (load for load in loads if load["target"] == "base"), key=lambda load: load["concurrency"], default=None
    )
    return {
        "start_s": (record.get("start") or {}).get("ready_s"),
        "ttft_ms": _median(alone, "ttft_ms"),
        "tpot_ms": _median(alone, "tpot_ms"),
        "output_tokens_per_s": max((load["output_tokens_per_s"] for load in loads), default=None),
        "expert_bytes": record.get("expert_bytes"),
        "peak_rss_bytes": memory.get("peak_rss_bytes"),
        "kl": max((row["kl"]["mean"] for row in quality), default=None),
        "top1_agreement": min((row["top1_agreement"] for row in quality), default=None),
    }


def _median(load: Mapping[str, Any] | None, times: str) -> float | None:
    found = load[times] if load else None
    return found["median"] if found else None


def objective_of(record: Mapping[str, Any], name: str) -> float | None:
    """A number of the summary, or of the plan; None if there is none."""
    summary, resolved = record.get("summary") or {}, record.get("resolved") or {}
    value = summary.get(name, resolved.get(name))
    return float(value) if isinstance(value, int | float) else None
