"""Which safetensors files of a checkpoint's folder are its weights, and which tensor is in which: as the index says, or
without one, all files of the folder. SGLang's loader (model_loader/weight_utils.py) and transformers read the same
files, and every tensor in them; a folder is refused if they would read something other than the index says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError
from kt_model.jsonfile import read_json
from kt_model.tensors.header import Tensor, TensorFile, read_header

INDEX = "model.safetensors.index.json"
CONSOLIDATED, ALONE = "consolidated.safetensors", "model.safetensors"
"""If both exist without an index, the second is read; it is the name of a single file of weights, which needs no
index."""
MODEL_NAMES = ("model.", "lm_head.")
"""Prefixes of weights' names, in every family."""
ONE_SOURCE = "Get the index and the shards again from the same source."


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix (out, in), which is one of many in a stored tensor."""

    expert: int
    """Which matrix."""
    rows: int
    """Rows of the whole matrix."""
    first: int
    stop: int
    transposed: bool
    """Whether the matrix is stored as (in, out)."""

    def cut(self, matrix: Any) -> Any:
        """A view of these rows; `matrix` as stored, from numpy or torch."""
        return (matrix.T if self.transposed else matrix)[self.first : self.stop]


@dataclass(frozen=True)
class Located:
    """A tensor: its file, its name there, and which part of that tensor it is."""

    file: TensorFile
    tensor: Tensor
    stored: str
    part: Part | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether its bytes are stored in another order than its shape."""
        return self.part is not None and self.part.transposed

    def cut(self, whole: Any) -> Any:
        """Its part of the stored tensor, as a view; from numpy or torch."""
        return whole if self.part is None else self.part.cut(whole[self.part.expert])


def weight_files(folder: Path, where: str | None = None) -> tuple[Path, ...]:
    """The files that hold the weights, by name; reads the index only. where: the key that names the folder."""
    present = {file.name: file for file in all_files(folder)}
    places = read_index(folder, where)
    if places is not None:
        missing = sorted(set(places.values()) - present.keys())
        if missing:
            problem = f"{len(missing)} files that {folder / INDEX} names are missing: {', '.join(missing[:3])}"
            raise LaunchError(where or str(folder / INDEX), problem, "Get them again.")
        names = set(places.values())
    else:
        names = present.keys() - ({CONSOLIDATED} if present.keys() == {CONSOLIDATED, ALONE} else set())
    if not present:
        problem = f"{folder} has no safetensors files"
        raise LaunchError(where or str(folder), problem, "Save the checkpoint with safe_serialization=True.")
    if not names:
        raise LaunchError(where or str(folder), f"{folder / INDEX} names no file", ONE_SOURCE)
    return tuple(present[name] for name in sorted(names))


def all_files(folder: Path) -> list[Path]:
    """Every *.safetensors of a folder except hidden ones, which SGLang and shells skip."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def read_index(folder: Path, where: str | None = None, name: str = INDEX) -> Mapping[str, str] | None:
    """Tensor -> name of its file in this folder; None without an index. name: of the index file."""
    path = folder / name
    if not path.is_file():
        return None
    places = read_json(path, where or str(path)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        problem = f"weight_map of {path} is not an object of names"
        raise LaunchError(where or str(path), problem, "Download the file again.")
    for tensor, file in places.items():
        if Path(file).name != file or file in ("", ".", ".."):
            problem = f"{path} says that {tensor} is in {file!r}, outside of the folder"
            raise LaunchError(where or str(path), problem, "Do not trust it.")
    return places


def locate_tensors(folder: Path, where: str | None = None) -> dict[str, Located]:
    """Every tensor of every weights file. Raises if a file is invalid, or if a tensor is in another file than the index
    says, or in two."""
    files = [read_header(path) for path in weight_files(folder, where)]
    places = read_index(folder, where)
    for file in files:
        if places is not None:
            _require_as_indexed(file, places)
        elif len(files) > 1:
            _require_model_names(file)
    located: dict[str, Located] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in located:
                problem = f"{name} is in {located[name].file.path.name} too, and no {INDEX} says which counts"
                raise LaunchError(str(file.path), problem, "Keep one copy of each shard.")
            located[name] = Located(file, tensor, name)
    return located


def _require_as_indexed(file: TensorFile, places: Mapping[str, str]) -> None:
    own = file.path.name
    for name in file.tensors:
        if places.get(name, own) != own:
            strays = [each for each in file.tensors if places.get(each, own) != own]
            problem = f"holds {_count(strays)}, which {INDEX} gives to {places[name]}"
            raise LaunchError(str(file.path), problem, ONE_SOURCE)
    absent = [name for name, place in places.items() if place == own and name not in file.tensors]
    if absent:
        raise LaunchError(str(file.path), f"has no {_count(absent)}, which {INDEX} says is in it", ONE_SOURCE)


def _require_model_names(file: TensorFile) -> None:
    strange = [name for name in file.tensors if not name.startswith(MODEL_NAMES)]
    if strange:
        problem = (
            f"holds {_count(strange)}, which is not a weight of a model, and SGLang reads it, since there is no {INDEX}"
        )
        raise LaunchError(str(file.path), problem, "Move the file out of the checkpoint's folder.")


def _count(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def unread_files(folder: Path, read: Iterable[Path]) -> list[str]:
    """Names of the safetensors files in the folder that are not read."""
    names = {file.name for file in read}
    return [file.name for file in all_files(folder) if file.name not in names]
