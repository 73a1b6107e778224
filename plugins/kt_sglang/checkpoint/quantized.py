"""Experts of a quantized method come from the folder made by kt-launch quantize, not from the checkpoint.

A tensor-parallel rank takes its part of the intermediate dimension: rows of gate and up, columns of down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.methods import method_of
from kt_model.weights.folder import LayerReader

Arrays = dict[str, npt.NDArray[Any]]


def is_quantized(method: str) -> bool:
    """Whether the method's experts come from a folder of quantized experts."""
    return method_of(method).quantized


def read_layer(
    folder: str, method: str, layer: int, experts: Iterable[int], tp_rank: int, tp_size: int
) -> Iterator[tuple[int, Arrays]]:
    """(expert, arrays) of one layer, restricted to this rank's part."""
    reader = LayerReader(Path(folder), layer)
    for expert in experts:
        arrays = reader.expert(expert)
        yield expert, cut(arrays, method, tp_rank, tp_size) if tp_size > 1 else arrays


def intermediate_size(arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """The number of gate's rows."""
    return int(arrays["gate"].shape[0])


def cut(arrays: Mapping[str, npt.NDArray[Any]], method: str, rank: int, size: int) -> Arrays:
    """One rank's part of an expert."""
    form, inner = method_of(method), arrays["gate"].shape[0]
    step = inner // size
    if inner % size or (form.group and step % form.group):
        group = form.group or 1
        raise ValueError(
            f"experts of intermediate size {inner} in groups of {group} cannot be split over {size} ranks; use another "
            "server.tp or kt.method=int8"
        )
    rows, columns = (
        slice(rank * step, (rank + 1) * step),
        slice(rank * step * form.bits // 8, (rank + 1) * step * form.bits // 8),
    )
    found = {name: arrays[name][rows] for name in ("gate", "up", "gate_scale", "up_scale")}
    found["down"] = np.ascontiguousarray(arrays["down"][:, columns])
    scale = arrays["down_scale"]
    if form.group:
        groups = slice(rank * step // form.group, (rank + 1) * step // form.group)
        scale = np.ascontiguousarray(scale[:, groups])
    return found | {"down_scale": scale}
