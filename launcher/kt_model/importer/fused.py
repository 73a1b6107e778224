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
Parameters = Mapping[tuple[str, int], str]
"""Module and number of base_layer -> the fused parameter."""


@dataclass(frozen=True)
class Wrapped:
    """One fused parameter's tensors."""

    key: Key
    a: Stored
    b: Stored


@dataclass(frozen=True)
class Sizes:
    """Hidden and inner size of an expert."""

    hidden: int
    inner: int

    def expected(self, parameter: str, layout: str) -> tuple[int, int]:
        """Last dimension of A and first of B."""
        inside, outside = (self.hidden, 2 * self.inner) if parameter == GATE_UP else (self.inner, self.hidden)
        return (inside, outside) if layout == NEW else (outside, inside)


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
    layout, parameters = _decide(context, wrapped, warnings)
    columns = [_columns(context, one, parameters[one.key.module, one.key.inner]) for one in wrapped]
    order = decide(context.where, context.typed, context.settings.b_layouts, context.marks, columns, warnings)
    found = zip(wrapped, columns, strict=True)
    return (pair for one, own in found for pair in _cut(one, own, layout, order, context.settings)), order


def _decide(context: FileContext, wrapped: Sequence[Wrapped], warnings: list[str]) -> tuple[str, Parameters]:
    """The layout: by shape; if shapes are ambiguous, by peft_version; otherwise refused."""
    every = {layout: _parameters(context, wrapped, layout) for layout in (NEW, OLD)}
    fitting = {layout: found for layout, found in every.items() if found is not None}
    version = context.settings.peft_version
    by_version = _layout_of_version(version)
    if not fitting:
        problem = _no_fit(wrapped, context.sizes)
        raise LaunchError(context.where, problem, "Choose the base that the adapter was trained on.")
    if len(fitting) == 2 and by_version is None:
        problem = "its fused expert tensors fit two layouts, and adapter_config.json has no peft_version to decide"
        raise LaunchError(context.where, problem, "Save the adapter again with peft 0.19 or newer.")
    chosen = by_version if by_version in fitting else next(iter(fitting))
    if by_version not in (None, chosen):
        warnings.append(f"fused experts have the layout of {chosen}, although peft_version is {version}")
    return chosen, fitting[chosen]


def _layout_of_version(version: str) -> str | None:
    numbers = version.split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    return NEW if tuple(int(number) for number in numbers) >= FIRST_NEW else OLD


def _parameters(context: FileContext, wrapped: Sequence[Wrapped], layout: str) -> Parameters | None:
    """The interpretation of every wrapped parameter in this layout, or None if one has none."""
    by_module: dict[str, dict[int, Wrapped]] = {}
    for one in wrapped:
        by_module.setdefault(one.key.module, {})[one.key.inner] = one
    found: dict[tuple[str, int], str] = {}
    for module, nested in by_module.items():
        names = _names(context, module, nested, layout)
        if names is None:
            return None
        found.update({(module, inner): name for inner, name in names.items()})
    return found


def _names(context: FileContext, module: str, nested: Mapping[int, Wrapped], layout: str) -> dict[int, str] | None:
    """Which parameter is at which depth: gate_up below down, or a single one."""
    if set(nested) == {0, 1}:
        choices = [{1: GATE_UP, 0: DOWN}]
    elif set(nested) == {0}:
        targeted = [name for name in (GATE_UP, DOWN) if _is_target(f"{module}.{name}", context.settings)]
        choices = [{0: name} for name in targeted or (GATE_UP, DOWN)]
    else:
        return None
    fitting = [names for names in choices if _fits(context.sizes, nested, names, layout)]
    return fitting[0] if len(fitting) == 1 else None


def _is_target(parameter: str, settings: Settings) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in settings.target_parameters)


def _own_sizes(nested: Mapping[int, Wrapped], names: Mapping[int, str], layout: str) -> Sizes:
    """Sizes according to the adapter itself, without a base."""
    depth, name = max(names.items())
    a, b = nested[depth].a.shape[-1], nested[depth].b.shape[0]
    inside, outside = (a, b) if layout == NEW else (b, a)
    return Sizes(inside, outside // 2) if name == GATE_UP else Sizes(outside, inside)


def _fits(sizes: Sizes | None, nested: Mapping[int, Wrapped], names: Mapping[int, str], layout: str) -> bool:
    sizes = sizes or _own_sizes(nested, names, layout)
    found = {inner: (one.a.shape[-1], one.b.shape[0]) for inner, one in nested.items()}
    return all(shape == sizes.expected(names[inner], layout) for inner, shape in found.items())


def _no_fit(wrapped: Sequence[Wrapped], sizes: Sizes | None) -> str:
    one = wrapped[0]
    got = f"{one.key.text} with A {list(one.a.shape)} and B {list(one.b.shape)}"
    expected = f"experts of hidden size {sizes.hidden} and inner size {sizes.inner}" if sizes else "any experts"
    return f"{got} does not fit {expected}, so which fused parameter it belongs to is unclear"


def _columns(context: FileContext, one: Wrapped, parameter: str) -> Columns:
    """B, and how many experts of which rank it holds."""
    rank = context.settings.rank_of(f"{one.key.peft_module}.{parameter}")
    rows, num_experts = one.a.shape[0], context.num_experts
    if rows != one.b.shape[1] or rows % rank or (num_experts is not None and rows != num_experts * rank):
        experts = f"{num_experts} experts" if num_experts is not None else "whole experts"
        problem = f"{one.key.text} has {rows} rows and B {one.b.shape[1]} columns, expected {experts} of rank {rank}"
        fix = "Take adapter_config.json and weights from the same save, and name its base."
        raise LaunchError(context.where, problem, fix)
    return Columns(parameter, one.b, rank, rows // rank)


def _cut(one: Wrapped, columns: Columns, layout: str, order: Order, settings: Settings) -> Iterator[Pair]:
    """The pairs of one fused parameter: views, nothing is copied."""
    parameter = f"{one.key.module}.{columns.parameter}"
    rank, count = columns.rank, columns.experts
    a_ErX = one.a.reshape(count, rank, one.a.shape[1])
    grouped = order.by_parameter[columns.parameter] == GROUPED
    layer, scale = one.key.target.layer, settings.scale_of(f"{one.key.peft_module}.{columns.parameter}")
    assert layer is not None
    for expert in range(count):
        a, b = a_ErX[expert], one.b[:, expert * rank : (expert + 1) * rank] if grouped else one.b[:, expert::count]
        if layout == OLD:
            a, b = b.T, a.T
        for projection, part_a, part_b in _projections(columns.parameter, a, b):
            yield Pair(expert_module(layer, expert, projection), part_a, part_b, scale, f"{parameter}[{expert}]")


def _projections(parameter: str, a: Stored, b: Stored) -> list[tuple[str, Stored, Stored]]:
    """gate and up share A; if B is block-diagonal (peft's own conversion), each uses its half of the rank."""
    if parameter == DOWN:
        return [("down", a, b)]
    inner, half = b.shape[0] // 2, a.shape[0] // 2
    if a.shape[0] % 2 == 0 and b[:inner, half:].is_zero() and b[inner:, :half].is_zero():
        return [("gate", a[:half], b[:inner, :half]), ("up", a[half:], b[inner:, half:])]
    return [("gate", a, b[:inner]), ("up", a, b[inner:])]
