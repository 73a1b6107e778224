"""A run's peak memory, sampled while it lives, next to the plan's estimate: memory.json.

Of the host, counts what cannot be dropped: anonymous and shared pages. The kernel may drop a checkpoint's mapped pages.
Of a GPU, what the run's own processes hold; where the driver does not tell processes apart, all that has gone since the
start, and the line says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from kt_launch.machine.host import read_gpu_memory, read_gpus
from kt_launch.machine.memory import MemorySampler
from kt_model.jsonfile import write_json
from kt_model.plan import HOST_MEMORY, LaunchPlan
from kt_model.units import gib

FILE = "memory.json"
GPU_SAMPLE_S = 5.0
OF_ALL = "all processes on it"


class PeakMemory(MemorySampler):
    """Samples a run's processes; at the end, reports how far off the estimate was."""

    def __init__(self, plan: LaunchPlan, run_folder: Path) -> None:
        super().__init__(lambda: self._watched)
        self._estimate = _estimated(plan)
        self._on_gpu = plan.value("server.device") == "cuda"
        self._file = run_folder / FILE
        self._watched: frozenset[int] = frozenset()
        self._gpu_free: dict[str, int] = {}
        self._gpu_names: dict[str, str] = {}
        self._own_peaks: dict[str, int] = {}
        self._card_peaks: dict[str, int] = {}
        self._gpus_seen_at = 0.0
        self._written: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self._on_gpu:
            gpus = read_gpus()
            self._gpu_free = {gpu.memory: gpu.free_bytes for gpu in gpus}
            self._gpu_names = {gpu.uuid: gpu.memory for gpu in gpus}
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.write()

    def watch(self, pids: Iterable[int]) -> None:
        """Sample these processes from now on. Writes the peaks so far, for readers of a live run."""
        self._watched = frozenset(pids)
        self.write()

    def sample(self) -> None:
        super().sample()
        if self._on_gpu and time.monotonic() - self._gpus_seen_at >= GPU_SAMPLE_S:
            self._gpus_seen_at = time.monotonic()
            self._sample_gpus()

    @property
    def _peaks(self) -> dict[str, int]:
        return {HOST_MEMORY: self.peak.kept_bytes, **(self._own_peaks or self._card_peaks)}

    def write(self) -> None:
        """Peak, estimate and error of each memory, into the run folder; a full disk does not end a server."""
        if any(self._peaks.values()) and self._peaks != self._written:
            self._written = self._peaks
            with contextlib.suppress(OSError):
                write_json(self._file, self._rows())

    def line(self) -> str:
        """One line for people; empty if nothing was measured or estimated."""
        peaks = [
            f"{name} {gib(row['measured_bytes'])} GiB at its peak"
            + (f" ({row['of']})" if "of" in row else "")
            + f", {gib(row['estimated_bytes'])} GiB estimated ({round(row['error_percent']):+} %)"
            for name, row in self._rows().items()
            if row["measured_bytes"] and row["estimated_bytes"]
        ]
        return "; ".join(peaks)

    def _rows(self) -> dict[str, dict[str, Any]]:
        rows = compare(self._estimate, self._peaks)
        others = set() if self._own_peaks else set(self._card_peaks)
        return {name: row | ({"of": OF_ALL} if name in others else {}) for name, row in rows.items()}

    def _sample_gpus(self) -> None:
        """What the watched processes hold; until the driver has named one of them, what has gone since the start."""
        for uuid, held in read_gpu_memory(self._watched).items():
            if name := self._gpu_names.get(uuid):
                self._own_peaks[name] = max(self._own_peaks.get(name, 0), held)
        if self._own_peaks:
            return
        for gpu in read_gpus():
            name, taken = gpu.memory, self._gpu_free.get(gpu.memory, gpu.free_bytes) - gpu.free_bytes
            self._card_peaks[name] = max(self._card_peaks.get(name, 0), taken)


def compare(estimate: Mapping[str, int], peaks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Each measured memory with its estimate and the error: positive if the estimate was too high."""
    rows: dict[str, dict[str, Any]] = {}
    for name, measured in peaks.items():
        expected = estimate.get(name, 0)
        error = round(100 * (expected - measured) / measured, 1) if measured and expected else None
        rows[name] = {"measured_bytes": measured, "estimated_bytes": expected, "error_percent": error}
    return rows


def _estimated(plan: LaunchPlan) -> dict[str, int]:
    """By memory; empty for a plan without an estimate."""
    fit = plan.resolved.get("fit")
    return {name: sum(parts.values()) for name, parts in fit.value.items()} if fit else {}
