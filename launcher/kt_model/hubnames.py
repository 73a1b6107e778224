"""A checkpoint's tensors under their hub names, which SGLang's loaders know, each with its location on disk.
transformers 5 holds all experts of a layer in two tensors and saves them so with save_original_format=False; Mixtral's
block has another name there.

E experts, H hidden size, I inner width of an expert. Fused, gate_up_proj is (E, 2I, H), gate above up, and down_proj is
(E, H, I); or both are stored transposed, (E, H, 2I) and (E, I, H), as transformers does for some models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kt_model.errors import LaunchError
from kt_model.families import Family, expert_weights
from kt_model.float8 import FLOAT8
from kt_model.tensors.folder import Located, Part
from kt_model.tensors.header import BITS, Tensor

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Experts:
    """What config.json says of the routed experts."""

    family: Family
    number: int
    hidden: int
    inner: int

    def fused_shape(self, projection: str, transposed: bool) -> tuple[int, int, int]:
        """Of the tensor of all experts of a layer."""
        rows, columns = (2 * self.inner, self.hidden) if projection == GATE_UP else (self.hidden, self.inner)
        return (self.number, columns, rows) if transposed else (self.number, rows, columns)


def under_hub_names(stored: Mapping[str, Located], experts: Experts) -> dict[str, Located]:
    """Every tensor by its name on a hub. Raises LaunchError for fused experts of another shape than announced, for
    float8 ones, and for two forms of one weight."""
    pattern = _fused_name(experts.family)
    fused = {name: match for name in stored if (match := pattern.fullmatch(_hub_name(name, experts.family)))}
    transposed = _lie_transposed({name: match[2] for name, match in fused.items()}, stored, experts)
    located: dict[str, Located] = {}
    for name, found in stored.items():
        if name in fused:
            parts = _parts(found, int(fused[name][1]), fused[name][2], experts, transposed)
        else:
            parts = iter([(_hub_name(name, experts.family), found)])
        for hub_name, part in parts:
            if hub_name in located:
                problem = f"{name} holds {hub_name}, which is in {located[hub_name].file.path.name} too"
                raise LaunchError(str(found.file.path), problem, "Keep one form of the experts.")
            located[hub_name] = part
    return located


def _hub_name(name: str, family: Family) -> str:
    ours, theirs = family.renamed
    return name.replace(theirs, ours) if theirs else name


def _fused_name(family: Family) -> re.Pattern[str]:
    """Matches layer and projection."""
    before = re.escape(family.expert.partition("{expert}")[0])
    return re.compile(before.replace(re.escape("{layer}"), r"(\d+)") + f"({GATE_UP}|{DOWN})")


def _lie_transposed(fused: Mapping[str, str], stored: Mapping[str, Located], experts: Experts) -> bool:
    """As the first says whose shape can tell: 2I = H and H = I never hold at once, so that one of the two can."""
    for name, projection in fused.items():
        shapes = [experts.fused_shape(projection, transposed) for transposed in (False, True)]
        if shapes[0] != shapes[1]:
            return stored[name].tensor.shape == shapes[1]
    return False


def _parts(
    found: Located, layer: int, projection: str, experts: Experts, transposed: bool
) -> Iterator[tuple[str, Located]]:
    """(name on a hub, its place) of every expert's matrices in a fused tensor."""
    shape = experts.fused_shape(projection, transposed)
    _require_shape(found, shape)
    rows, columns = shape[1:][::-1] if transposed else shape[1:]
    names = slice(0, 2) if projection == GATE_UP else slice(2, 3)
    for expert in range(experts.number):
        inside = expert_weights(experts.family, layer, expert)[names]
        height = rows // len(inside)
        for number, name in enumerate(inside):
            part = Part(expert, rows, number * height, (number + 1) * height, transposed)
            yield name, replace(found, part=part, tensor=_tensor(found.tensor, part, columns))


def _tensor(whole: Tensor, part: Part, columns: int) -> Tensor:
    """A part as a tensor of its own: (out, in). For a transposed one, `start` is the byte of its first value, and `end`
    is `start` plus its size."""
    step = BITS[whole.dtype] // 8
    height = part.stop - part.first
    before = part.expert * part.rows * columns + part.first * (1 if part.transposed else columns)
    start = whole.start + before * step
    return Tensor(whole.dtype, (height, columns), start, start + height * columns * step)


def _require_shape(found: Located, shape: tuple[int, ...]) -> None:
    tensor, path = found.tensor, str(found.file.path)
    if tensor.shape != shape:
        problem = f"{found.stored} has shape {list(tensor.shape)}, but {list(shape)} is expected from config.json"
        raise LaunchError(path, problem, "Get config.json and the safetensors files from the same source.")
    if tensor.dtype == FLOAT8:
        problem = f"{found.stored} has all experts of a layer in float8, which is supported only for single experts"
        raise LaunchError(path, problem, "Save it with save_original_format=True, or use the bfloat16 checkpoint.")
