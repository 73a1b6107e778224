"""Formats B and C: PEFT's target_parameters on fused experts, one pair per layer and parameter, with all experts in it.

A's rows are ordered (expert, rank); layouts.py finds the order of B's columns. peft >= 0.19 stores A (E·r, in) and B
(out, r·E) with ΔW = B·A; older versions A (E·r, out) and B (in, r·E) with ΔW = (B·A)ᵀ. gate_up is gate's rows, then
up's. Two parameters of one module are nested: the first, gate_up_proj, under the name base_layer; a single one has no
base_layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kt_model.errors import LaunchError
from kt_model.importer.layouts import GROUPED, Columns, Order, decide
from kt_model.importer.names import Key, expert_module
from kt_model.importer.normal import Pair
from kt_model.importer.settings import Settings
from kt_model.tensors.stored import Stored

GATE_UP, DOWN = "gate_up_proj", "down_proj"
NEW, OLD = "peft >= 0.19", "peft < 0.19"
FIRST_NEW = (0, 19)


@dataclass(frozen=True)
class Wrapped:
    """One fused parameter's tensors."""

    key: Key
    a: Stored
    b: Stored


@dataclass(frozen=True)
class Reading:
    """The interpretation of a wrapped parameter."""

    parameter: str
    layout: str


@dataclass(frozen=True)
class Sizes:
    """Hidden and inner size of an expert."""

    hidden: int
    inner: int

    def expected(self, reading: Reading) -> tuple[int, int]:
        """Last dimension of A and first of B."""
        inside, outside = (self.hidden, 2 * self.inner) if reading.parameter == GATE_UP else (self.inner, self.hidden)
        return (inside, outside) if reading.layout == NEW else (outside, inside)


@dataclass(frozen=True)
class FileContext:
    """What is known about a file besides its tensors. typed: lora.layout; marks: indications of Unsloth."""

    where: str
    settings: Settings
    typed: str
    marks: tuple[str, ...]
    sizes: Sizes | None
    num_experts: int | None


def read_pairs(context: FileContext, wrapped: Sequence[Wrapped], warnings: list[str]) -> tuple[Iterator[Pair], Order]:
    """The pairs of all experts of all layers, and the order of B's columns; one layout for the file, or a refusal."""
    readings = _decide(context.where, wrapped, context.settings, context.sizes, warnings)
    found = [(one, readings[one.key.module, one.key.inner]) for one in wrapped]
    columns = [_columns(context, one, reading) for one, reading in found]
    order = decide(context.where, context.typed, context.settings.b_layouts, context.marks, columns, warnings)
    parts = zip(found, columns, strict=True)
    return (pair for (one, reading), own in parts for pair in _cut(one, reading, own, order, context.settings)), order


def _decide(
    where: str, wrapped: Sequence[Wrapped], settings: Settings, sizes: Sizes | None, warnings: list[str]
) -> Mapping[tuple[str, int], Reading]:
    """By shape; if shapes are ambiguous, by peft_version; otherwise refused."""
    fitting = {layout: _readings(wrapped, settings, layout, sizes) for layout in (NEW, OLD)}
    open_layouts = [layout for layout, found in fitting.items() if found is not None]
    by_version = _layout_of_version(settings.peft_version)
    if not open_layouts:
        raise LaunchError(where, _no_fit(wrapped, sizes), "Choose the base that the adapter was trained on.")
    if len(open_layouts) == 2:
        if by_version is None:
            problem = "its fused expert tensors fit two layouts, and adapter_config.json has no peft_version to decide"
            raise LaunchError(where, problem, "Save the adapter again with peft 0.19 or newer.")
        open_layouts = [by_version]
    chosen = open_layouts[0]
    if by_version not in (None, chosen):
        warnings.append(f"fused experts have the layout of {chosen}, although peft_version is {settings.peft_version}")
    readings = fitting[chosen]
    assert readings is not None
    return readings


def _layout_of_version(version: str) -> str | None:
    numbers = version.split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    return NEW if tuple(int(number) for number in numbers) >= FIRST_NEW else OLD


def _readings(
    wrapped: Sequence[Wrapped], settings: Settings, layout: str, sizes: Sizes | None
) -> dict[tuple[str, int], Reading] | None:
    """The interpretation of every wrapped parameter in this layout, or None if one has none."""
    by_module: dict[str, dict[int, Wrapped]] = {}
    for one in wrapped:
        by_module.setdefault(one.key.module, {})[one.key.inner] = one
    found: dict[tuple[str, int], Reading] = {}
    for module, nested in by_module.items():
        names = _names(module, nested, settings, layout, sizes)
        if names is None:
            return None
        found.update({(module, inner): Reading(name, layout) for inner, name in names.items()})
    return found


def _names(
    module: str, nested: Mapping[int, Wrapped], settings: Settings, layout: str, sizes: Sizes | None
) -> dict[int, str] | None:
    """Which parameter is at which depth: gate_up below down, or a single one."""
    if set(nested) == {0, 1}:
        choices = [{1: GATE_UP, 0: DOWN}]
    elif set(nested) == {0}:
        targeted = [name for name in (GATE_UP, DOWN) if _is_target(f"{module}.{name}", settings)]
        choices = [{0: name} for name in targeted or (GATE_UP, DOWN)]
    else:
        return None
    fitting = [names for names in choices if _fits(nested, names, layout, sizes or _own_sizes(nested, names, layout))]
    return fitting[0] if len(fitting) == 1 else None


def _is_target(parameter: str, settings: Settings) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in settings.target_parameters)


def _own_sizes(nested: Mapping[int, Wrapped], names: Mapping[int, str], layout: str) -> Sizes:
    """Sizes according to the adapter itself, without a base."""
    depth, name = max(names.items())
    a, b = nested[depth].a.shape[-1], nested[depth].b.shape[0]
    inside, outside = (a, b) if layout == NEW else (b, a)
    return Sizes(inside, outside // 2) if name == GATE_UP else Sizes(outside, inside)


def _fits(nested: Mapping[int, Wrapped], names: Mapping[int, str], layout: str, sizes: Sizes) -> bool:
    return all(
        (one.a.shape[-1], one.b.shape[0]) == sizes.expected(Reading(names[inner], layout))
        for inner, one in nested.items()
    )


def _no_fit(wrapped: Sequence[Wrapped], sizes: Sizes | None) -> str:
    one = wrapped[0]
    got = f"{one.key.text} with A {list(one.a.shape)} and B {list(one.b.shape)}"
    expected = f"experts of hidden size {sizes.hidden} and inner size {sizes.inner}" if sizes else "any experts"
    return f"{got} does not fit {expected}, so which fused parameter it belongs to is unclear"


def _columns(context: FileContext, one: Wrapped, reading: Reading) -> Columns:
    """B, and how many experts of which rank it holds."""
    rank = context.settings.rank_of(f"{one.key.peft_module}.{reading.parameter}")
    rows, num_experts = one.a.shape[0], context.num_experts
    if rows != one.b.shape[1] or rows % rank or (num_experts is not None and rows != num_experts * rank):
        experts = f"{num_experts} experts" if num_experts is not None else "whole experts"
        problem = f"{one.key.text} has {rows} rows and B {one.b.shape[1]} columns, expected {experts} of rank {rank}"
        raise LaunchError(
            context.where, problem, "Take adapter_config.json and weights from the same save, and name its base."
        )
    return Columns(reading.parameter, one.b, rank, rows // rank)


def _cut(one: Wrapped, reading: Reading, columns: Columns, order: Order, settings: Settings) -> Iterator[Pair]:
    """The pairs of one fused parameter: views, nothing is copied."""
    parameter = f"{one.key.module}.{reading.parameter}"
    rank, count = columns.rank, columns.experts
    a_ErX = one.a.reshape(count, rank, one.a.shape[1])
    grouped = order.by_parameter[reading.parameter] == GROUPED
    layer, scale = one.key.target.layer, settings.scale_of(f"{one.key.peft_module}.{reading.parameter}")
    assert layer is not None
    for expert in range(count):
        a, b = a_ErX[expert], one.b[:, expert * rank : (expert + 1) * rank] if grouped else one.b[:, expert::count]
        if reading.layout == OLD:
            a, b = b.T, a.T
        for projection, part_a, part_b in _projections(reading.parameter, a, b):
            yield Pair(expert_module(layer, expert, projection), part_a, part_b, scale, f"{parameter}[{expert}]")


def _projections(parameter: str, a: Stored, b: Stored) -> list[tuple[str, Stored, Stored]]:
    """gate and up share A; if B is block-diagonal (peft's own conversion), each uses its half of the rank."""
    if parameter == DOWN:
        return [("down", a, b)]
    inner, half = b.shape[0] // 2, a.shape[0] // 2
    if a.shape[0] % 2 == 0 and b[:inner, half:].is_zero() and b[inner:, :half].is_zero():
        return [("gate", a[:half], b[:inner, :half]), ("up", a[half:], b[inner:, half:])]
    return [("gate", a, b[:inner]), ("up", a, b[inner:])]
