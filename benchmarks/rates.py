"""How fast one token's experts are read on each host that was measured, out of the records, which the launcher's sizing
is computed from: `python benchmarks/rates.py > conf/rates.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = {"AMXBF16_SFT": "bf16", "AMXINT8_SFT": "int8", "AMXINT4_SFT": "int4"}
NAMED_OTHERWISE = ("accuracy.json", "load_times.json")


def records() -> list[tuple[str, dict[str, Any]]]:
    """(host, cell) of our kernels for one token without adapters."""
    files = [
        file for file in sorted(RESULTS.glob("*.json")) if ".run." not in file.name and file.name not in NAMED_OTHERWISE
    ]
    cells = [(file.name.partition("-")[0], cell) for file in files for cell in json.loads(file.read_text())]
    return [
        (host, cell) for host, cell in cells if (cell["impl"], cell["tokens"], cell["adapters"]) == ("kt_kernels", 1, 0)
    ]


def rates() -> dict[str, Any]:
    """Host -> threads, GB/s of plain reading, and by method [an expert's weights in millions, GB/s of experts]."""
    found: dict[str, Any] = {}
    for host, cell in records():
        own = found.setdefault(host, {"isa": cell["isa"], "threads": cell["threads"], "read": [], "experts": {}})
        own["read"].append(cell["peaks"]["read_gbs"])
        method = METHODS[cell["method"]]
        values = round(cell["expert_bytes"] / _bytes_a_weight(method) / 1e6, 1)
        own["experts"].setdefault(method, []).append([values, round(cell["weight_gbs"], 1)])
    for own in found.values():
        own["read"] = round(median(own["read"]), 1)
        own["experts"] = {method: sorted(own["experts"][method]) for method in METHODS.values()}
    return found


def _bytes_a_weight(method: str) -> float:
    return {"bf16": 2.0, "int8": 1.0, "int4": 0.5625}[method]


if __name__ == "__main__":
    print(json.dumps(rates(), indent=1))
