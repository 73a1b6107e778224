"""The order of the columns of a fused B: (rank, expert), as in every version of PEFT, or (expert, rank), as Unsloth's
own forward read them from February to September 2026.

Names and shapes are the same in both, and A's rows are ordered (expert, rank) in both. Since 17 September 2026 Unsloth
declares the order in adapter_config.json (https://github.com/unslothai/unsloth-zoo/pull/1232 and /1269): lora_B_layout,
and for each parameter unsloth_fused_expert_lora. If nothing declares it, it is measured.

The measure is the similarity of one expert's columns. All are sums of the same gradients of that expert's output with
different weights, so they are closer to each other than to those of other experts: the right order has the larger mean
squared cosine within experts. tests/fixtures/measure_layouts.py trains adapters with PEFT and tests this: of 668
answers 564 were right, 104 were "cannot tell" (rank 2 of eight experts, Muon, random starts), none wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.adapters import AUTO_LAYOUT, LAYOUT_KEY
from kt_model.errors import LaunchError
from kt_model.tensors.stored import Stored

RANK_MAJOR, GROUPED = "rank_major", "grouped_by_expert"
ORDERS = (RANK_MAJOR, GROUPED)

SAMPLED_TENSORS, SAMPLED_ROWS = 8, 512
"""Size of the sample from a large adapter; a small one is measured as a whole."""
CLEAR_SIGMAS, CLEAR_RATIO = 5.0, 1.5
"""Minimum difference between the two orders; less may be chance. Random numbers reached 3.9 deviations in 4000
draws."""
EQUAL = 1 - 1e-5
"""Cosine of columns that are equal except for rounding."""
LEAST_EXPERTS = 4
"""Minimum number of experts, over all tensors, with two columns to compare."""

TELL = (
    "Set lora.layout=grouped_by_expert if Unsloth trained it between February and 17 September 2026, "
    "else lora.layout=rank_major."
)


@dataclass(frozen=True)
class Columns:
    """One fused B (rows, rank · experts) and its parameter."""

    parameter: str
    b: Stored
    rank: int
    experts: int


@dataclass(frozen=True)
class Order:
    """The order of columns, by parameter (gate_up_proj, down_proj), and how it is known."""

    by_parameter: Mapping[str, str]
    why: str

    def __str__(self) -> str:
        names = sorted(set(self.by_parameter.values()))
        return names[0] if len(names) == 1 else ", ".join(f"{k} {v}" for k, v in sorted(self.by_parameter.items()))


@dataclass(frozen=True)
class Evidence:
    """Mean squared cosine between columns of one expert, in each order, and the significance of their difference."""

    alike: Mapping[str, float]
    sigmas: float

    @property
    def clear(self) -> str | None:
        """The order that the values indicate, if any."""
        low, high = sorted(ORDERS, key=lambda order: self.alike[order])
        apart = self.sigmas >= CLEAR_SIGMAS and self.alike[high] >= CLEAR_RATIO * self.alike[low]
        return high if apart else None

    def __str__(self) -> str:
        named = " and ".join(f"{value:.2g} as {order}" for order, value in self.alike.items())
        return f"mean squared cosine between the columns of one expert is {named}"


def decide(
    where: str, typed: str, declared: Mapping[str, str], marks: Sequence[str], found: Sequence[Columns], warn: list[str]
) -> Order:
    """The order of every fused B: the typed one, else the one declared in the configuration, else the one the values
    indicate.

    typed: lora.layout; declared: parameter -> order, "" for all; marks: indications of Unsloth. Raises LaunchError if
    the declaration is unknown, or if nothing decides and Unsloth may have trained the adapter.
    """
    parameters = sorted({one.parameter for one in found})
    if all(one.rank == 1 or one.experts == 1 for one in found):
        return Order(dict.fromkeys(parameters, RANK_MAJOR), "both orders are the same for one rank or one expert")
    evidence = measure(found)
    if typed != AUTO_LAYOUT:
        order = Order(dict.fromkeys(parameters, typed), LAYOUT_KEY)
    elif declared:
        order = _declared(where, declared, parameters)
    else:
        return _unsaid(where, evidence, marks, parameters, warn)
    if evidence.clear and evidence.clear not in order.by_parameter.values():
        warn.append(f"fused experts are read as {order} ({order.why}), but look like {evidence.clear}: {evidence}")
    return order


def _declared(where: str, declared: Mapping[str, str], parameters: Sequence[str]) -> Order:
    orders = {name: declared.get(name, declared.get("", "")) for name in parameters}
    for name, order in orders.items():
        if order not in ORDERS:
            problem = f"adapter_config.json says lora_B_layout={order or 'nothing'} of {name}"
            raise LaunchError(where, f"{problem}, but one of {', '.join(ORDERS)} is expected", TELL)
        if declared.get("", order) != order:
            problem = f"adapter_config.json says lora_B_layout={declared['']}, but {order} of {name}"
            raise LaunchError(where, problem, TELL)
    return Order(orders, "adapter_config.json: lora_B_layout")


def _unsaid(where: str, evidence: Evidence, marks: Sequence[str], parameters: Sequence[str], warn: list[str]) -> Order:
    order = evidence.clear
    if order is None and marks:
        problem = (
            "the columns of its fused experts may run in PEFT's order or in that of an earlier Unsloth: "
            f"adapter_config.json has no lora_B_layout, the values do not show it, and Unsloth left {', '.join(marks)}"
        )
        raise LaunchError(where, problem, TELL)
    if order == GROUPED and not marks:
        note = f"fused experts are read as {GROUPED}, which is not PEFT's order: {evidence}"
        warn.append(f"{note}; if that is wrong, set lora.layout={RANK_MAJOR}")
    why = f"measured: {evidence}" if order else "PEFT's order, since nothing indicates another"
    return Order(dict.fromkeys(parameters, order or RANK_MAJOR), why)


def measure(found: Sequence[Columns]) -> Evidence:
    """What the values indicate; for a large adapter, only some tensors, and some rows of each, are read."""
    picked = sorted({round(place) for place in np.linspace(0, len(found) - 1, SAMPLED_TENSORS)})
    alike: dict[str, list[npt.NDArray[np.float64]]] = {order: [] for order in ORDERS}
    for one in (found[place] for place in picked):
        # Each half of the rows separately: gate and up have columns of their own if PEFT converted an adapter.
        for half in np.array_split(np.arange(one.b.shape[0]), 2):
            rows = one.b[half[:: max(1, 2 * len(half) // SAMPLED_ROWS)]].float32().astype(np.float64)
            for order in ORDERS:
                alike[order].append(_likeness(rows, order, one.rank, one.experts))
        one.b.forget()
    return _compare({order: np.concatenate(values) for order, values in alike.items()})


def _likeness(rows: npt.NDArray[np.float64], order: str, rank: int, experts: int) -> npt.NDArray[np.float64]:
    """Mean squared cosine between the columns of each expert that has any to compare.

    Zero columns do not count, nor do equal ones: if all experts share one B, equal columns would favour the order that
    groups columns of different experts.
    """
    split = (experts, rank) if order == GROUPED else (rank, experts)
    b_ErO = rows.reshape(-1, *split).transpose((1, 2, 0) if order == GROUPED else (2, 1, 0))
    norm_Er1 = np.linalg.norm(b_ErO, axis=2, keepdims=True)
    there_Er1 = norm_Er1 > 0
    unit_ErO = (b_ErO / np.where(there_Er1, norm_Er1, 1)).astype(np.float32)
    cosine_Err = unit_ErO @ unit_ErO.transpose(0, 2, 1)
    counted_Err = there_Er1 & there_Er1.transpose(0, 2, 1) & (cosine_Err < EQUAL)
    pairs_E = counted_Err.sum((1, 2))
    squares_E = np.square(cosine_Err, out=cosine_Err).sum((1, 2), dtype=np.float64, where=counted_Err)
    return np.asarray(squares_E[pairs_E > 0] / pairs_E[pairs_E > 0], np.float64)


def _compare(alike: Mapping[str, npt.NDArray[np.float64]]) -> Evidence:
    if min(len(values) for values in alike.values()) < LEAST_EXPERTS:
        return Evidence(dict.fromkeys(ORDERS, 0.0), 0.0)
    means = {order: float(values.mean()) for order, values in alike.items()}
    spread = math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in alike.values()))
    apart = abs(means[RANK_MAJOR] - means[GROUPED])
    return Evidence(means, apart / spread if spread else 0.0)


def read_declared(config: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> order, "" for all, as in adapter_config.json; unvalidated."""
    orders = {"": str(config["lora_B_layout"])} if config.get("lora_B_layout") else {}
    detail = config.get("unsloth_fused_expert_lora")
    parameters = detail.get("parameters") if isinstance(detail, dict) else None
    for name, facts in parameters.items() if isinstance(parameters, dict) else ():
        if isinstance(facts, dict) and "lora_B_layout" in facts:
            parameter, order = str(name).rpartition(".")[2], str(facts["lora_B_layout"])
            orders[parameter] = order if orders.get(parameter, order) == order else "mixed"
    return orders


def find_marks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Indications that Unsloth trained an adapter. It writes no version anywhere, so none of them gives a date."""
    mapping = config.get("auto_mapping")
    fixed = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    marks = {
        "auto_mapping.unsloth_fixed in adapter_config.json": fixed,
        "its name in base_model_name_or_path": "unsloth" in str(config.get("base_model_name_or_path")).lower(),
        "unsloth_fused_expert_lora in adapter_config.json": bool(config.get("unsloth_fused_expert_lora")),
        "its tag in README.md": _is_tagged(folder / "README.md"),
    }
    return tuple(mark for mark, there in marks.items() if there)


def _is_tagged(card: Path) -> bool:
    """Whether the model card's header has the tag Unsloth."""
    try:
        if not card.is_file():
            return False
        with card.open(encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 14)
    except OSError:
        return False
    header = head.split("\n---", 1)[0] if head.startswith("---") else ""
    return any(line.strip(" -'\"") == "unsloth" for line in header.splitlines())
