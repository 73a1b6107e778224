"""How fast a machine reads the experts of one token: as recorded for measured hosts (conf/rates.json, written by
benchmarks/rates.py), or measured now on this machine. Run as a program, it is that measurement, which needs torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kt_launch.machine.folders import conf_folder
from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError
from kt_model.jsonfile import read_json_or_empty
from kt_model.methods import METHODS, method_of

HERE = "this"
POOL_BYTES = 400 << 20
"""Size of the experts measured on this machine: more than its caches hold."""
MEASURE_S = 0.7
MEASURE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Rates:
    """Bytes per second. experts: method -> (weights of one expert in millions, rate), one pair per measured shape."""

    host: str
    read: float
    experts: Mapping[str, Sequence[tuple[float, float]]]

    def of(self, method: str, base: Checkpoint) -> float:
        """The rate of the measured shape nearest in size to these experts."""
        size = 3 * base.hidden_size * base.moe_intermediate_size / 1e6
        return min(self.experts[method], key=lambda pair: max(pair[0] / size, size / pair[0]))[1]


def recorded_hosts() -> list[str]:
    """Names of the measured hosts."""
    return sorted(read_json_or_empty(conf_folder() / "rates.json"))


def read_rates(host: str, base: Checkpoint, threads: int) -> Rates:
    """The rates of a recorded host by name, or of this machine, measured for that model's experts. Raises
    LaunchError."""
    if host == HERE:
        return _measure(base, threads)
    found = read_json_or_empty(conf_folder() / "rates.json").get(host)
    if not isinstance(found, dict):
        fix = f"Choose from {', '.join([HERE, *recorded_hosts()])}."
        raise LaunchError("fit.host", f"no host {host} was measured", fix)
    experts = {method: [(size, rate * 1e9) for size, rate in pairs] for method, pairs in found["experts"].items()}
    return Rates(host, found["read"] * 1e9, experts)


def _measure(base: Checkpoint, threads: int) -> Rates:
    """In a subprocess, since the launcher does not import torch."""
    asked = {"hidden": base.hidden_size, "inner": base.moe_intermediate_size, "top_k": base.top_k, "threads": threads}
    command = [sys.executable, "-P", "-m", "kt_launch.gathering.rates", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S)
    except subprocess.TimeoutExpired as failure:
        raise LaunchError("fit.host", "measuring this machine took too long", "Try again when it is idle.") from failure
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        names = ", ".join(recorded_hosts())
        fix = f"Install torch, or set fit.host to one that was measured: {names}."
        raise LaunchError("fit.host", f"this machine cannot be measured: {reason}", fix)
    found = json.loads(done.stdout)
    size = 3 * base.hidden_size * base.moe_intermediate_size / 1e6
    return Rates(HERE, found["read"], {method: [(size, rate)] for method, rate in found["experts"].items()})


def measure(hidden: int, inner: int, top_k: int, threads: int) -> dict[str, Any]:
    """Bytes per second at which one token's experts are read, by method; `read` is the best of them."""
    experts = {name: _rate(name, hidden, inner, top_k, threads) for name in METHODS}
    return {"read": max(experts.values()), "experts": experts}


def _rate(name: str, hidden: int, inner: int, top_k: int, threads: int) -> float:
    import torch

    import kt_kernels

    method = method_of(name).sglang_name
    shape: dict[str, Any] = {"method": method, "hidden_size": hidden, "intermediate_size": inner}
    (one,) = kt_kernels.packed_bytes(num_experts=1, **shape)
    count = max(POOL_BYTES // one, 2 * top_k)
    moe = kt_kernels.MoE(num_experts=count, pool=kt_kernels.ThreadPool(threads), **shape)
    made = torch.Generator().manual_seed(1)
    gate, up, down = (
        (torch.randn(*size, generator=made) / size[-1] ** 0.5).to(torch.bfloat16)
        for size in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    for expert in range(count):
        moe.load_expert(expert, gate, up, down)
    x, out = torch.randn(1, hidden, generator=made).to(torch.bfloat16), torch.empty(1, hidden)
    shares, began = torch.full((1, top_k), 1 / top_k), time.perf_counter()
    times: list[float] = []
    while time.perf_counter() - began < MEASURE_S or len(times) < 5:
        first = len(times) * top_k
        ids = torch.tensor([[(first + each) % count for each in range(top_k)]])
        start = time.perf_counter()
        moe.forward(x, ids, shares, None, out)
        times.append(time.perf_counter() - start)
    return top_k * one / sorted(times)[len(times) // 2]


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
