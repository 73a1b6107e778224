"""Reads the records of benchmarks/results back, for report.py and goals.py: which cell, which of several
measurements."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
METHODS = {"AMXBF16_SFT": "BF16", "AMXINT8_SFT": "INT8", "AMXINT4_SFT": "INT4"}
OURS, PEER = "kt_kernels", "kt-kernel"


@dataclass
class Results:
    """All files of one machine: those whose names begin with its name and a dash."""

    machine: str
    records: list[Record] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def ours(self, method: str, shape: str, adapters: str, tokens: int) -> Record | None:
        return self._best(OURS, method, shape, adapters, tokens)

    def other(self, impl: str, method: str, shape: str, adapters: str, tokens: int) -> Record | None:
        """Of kt-kernel the better thread count."""
        return self._best(impl, method, shape, adapters, tokens)

    def _best(self, impl: str, method: str, shape: str, adapters: str, tokens: int) -> Record | None:
        key = method, shape, adapters, tokens
        names = ("cell_method", "shape", "adapter_case", "tokens")
        found = [
            record
            for record in self.records
            if record["impl"].partition("@")[0] == impl and tuple(record[name] for name in names) == key
        ]
        quiet = [record for record in found if not record["noisy"]] or found
        if impl != PEER:
            return max(quiet, key=lambda record: record["measured_at"], default=None)
        latest = max((record["measured_at"] for record in quiet), default="")
        return min((record for record in quiet if record["measured_at"] == latest), key=lambda r: r["ms"], default=None)

    def cells(self, adapters: str = "none") -> Iterator[tuple[str, str, int]]:
        """Method, shape and token count of everything measured with these adapters, in the order of the tables."""
        found = {
            (record["cell_method"], record["shape"], record["tokens"])
            for record in self.records
            if record["adapter_case"] == adapters
        }
        yield from sorted(found, key=lambda cell: (_shape_order(cell[1]), list(METHODS).index(cell[0]), cell[2]))

    def shapes(self) -> list[str]:
        return sorted({record["shape"] for record in self.records}, key=_shape_order)


def _shape_order(shape: str) -> tuple[int, str]:
    order = ["v2-lite", "qwen3-30b", "v3"]
    return (order.index(shape) if shape in order else len(order), shape)


def read_results(folder: Path, machine: str) -> Results:
    results = Results(machine)
    for file in sorted(folder.glob(f"{machine}-*.run.json")):
        about = json.loads(file.read_text())
        results.runs.append(about)
        results.conditions.update(about["conditions"])
        records = file.with_name(file.name.replace(".run.json", ".json"))
        if records.exists():
            results.records.extend(json.loads(records.read_text()))
    return results
