"""Rows as a sweep of three methods and a failure would leave them; the numbers are made up, the format is not."""

from __future__ import annotations

from typing import Any

from kt_launch.sweeps.folder import Row
from kt_launch.sweeps.summary import summarize

PHASES = {"start": 0, "weights": 14.2, "adapters": 31.5, "memory": 33, "warm-up": 36.1, "proof": 38.4, "ready": 40.2}


def load(target: str, concurrency: int, speed: float) -> dict[str, Any]:
    """One load, the faster the higher `speed`."""
    rate = speed * concurrency**0.7

    def times(median: float) -> dict[str, float]:
        return {"mean": median * 1.1, "median": median, "p90": median * 1.6, "p99": median * 2.2}

    return {
        "target": target,
        "model": "demo" if target == "base" else f"demo:{target}",
        "concurrency": concurrency,
        "requests": 8,
        "completed": 8,
        "error": None,
        "input_tokens": 1024,
        "output_tokens": 256,
        "duration_s": 256 / rate,
        "requests_per_s": rate / 32,
        "output_tokens_per_s": rate,
        "total_tokens_per_s": rate * 5,
        "ttft_ms": times(4000 / speed * concurrency**0.5),
        "tpot_ms": times(1000 * concurrency / rate),
        "itl_ms": times(1000 * concurrency / rate),
        "latency_ms": times(40000 / speed),
    }


def compared(target: str, kl: float) -> dict[str, Any]:
    """One target's quality."""
    reference = {"file": "/cache/references/0123.npz", "sha256": "0" * 64, "by": "an earlier BF16 server"}
    share = {"top1_agreement": 1 - kl * 4, "covered": 0.993}
    return {"target": target, "tokens": 812, "kl": {"mean": kl, "max": kl * 9}, **share, "reference": reference}


def row(number: int, method: str, speed: float, gib: float, kl: float) -> Row:
    """A job that ended well."""
    record: dict[str, Any] = {
        "format": 1,
        "began": "2026-11-23T09:30:00+0000",
        "action": "bench",
        "state": "ok",
        "exit_code": 0,
        "error": None,
        "number": number,
        "overrides": ["model=demo", f"kt.method={method}", "action=bench"],
        "run_folder": f"/home/someone/.local/state/kt-launch/runs/20261123-09300{number}-demo",
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_bytes": 24 * 2**30},
        "host": "epyc-1",
        "versions": {"kt-launch": "0.1.0", "sglang": "0.5.23", "torch": "2.13.0", "Python": "3.11.7"},
        "bench": {"requests": 8, "input_tokens": 128, "output_tokens": 32, "concurrency": [1, 2, 4, 8]},
        "expert_bytes": int(gib * 2**29),
        "resolved": {"model.name": "demo", "kt.method": method},
        "seconds": 93.0,
        "start": {"ready_s": 40.2 - number, "phases": {name: at * (1 - number / 40) for name, at in PHASES.items()}},
        "memory": {"peak_rss_bytes": int(gib * 2**30), "pss_bytes": int(gib * 2**29), "processes": 3},
        "loads": [load(target, many, speed) for target in ("base", "west") for many in (1, 2, 4, 8)],
        "quality": [compared("base", kl), compared("west", kl * 1.3)],
    }
    record["loads"][4:] = [load("west", many, speed * 0.87) for many in (1, 2, 4, 8)]
    return Row({**record, "summary": summarize(record)})


def failed(number: int) -> Row:
    """A job that did not."""
    return Row(
        {
            "format": 1,
            "began": "2026-11-23T09:36:00+0000",
            "action": "bench",
            "state": "crashed",
            "exit_code": 137,
            "error": "killed by SIGKILL; the kernel killed a process that ran out of memory meanwhile",
            "number": number,
            "overrides": ["model=demo", "kt.method=fp8", "action=bench"],
        }
    )


def some_rows() -> list[Row]:
    """Four jobs."""
    return [
        row(0, "bf16", 60, 11.2, 0.0),
        row(1, "int8", 96, 6.4, 0.0009),
        row(2, "int4", 131, 4.1, 0.021),
        failed(3),
    ]
