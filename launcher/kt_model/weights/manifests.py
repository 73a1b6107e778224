"""The manifests of folders of quantized experts and of packed cache entries, and the validation of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from kt_model.atomic_file import read_regular
from kt_model.errors import LaunchError
from kt_model.jsonfile import first_mistake

EXPERTS_FORMAT, PACKED_FORMAT = "kt-launch experts", "kt-launch packed experts"
VERSION = 1
"""The file name of both."""


def _exactly(expected: Any) -> AfterValidator:
    def check(value: Any) -> Any:
        if value != expected:
            raise ValueError(f"is {value!r}")
        return value

    return AfterValidator(check)


class Read(BaseModel):
    """Base of the manifests: unknown fields are ignored, and a number must be a number, not a string."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Shard(Read):
    """One file: its size and hash as written."""

    bytes: int
    sha256: str


class PackedShard(Shard):
    """One layer's parts, one per pool, and the rows of gate that they were packed from."""

    layer: int
    parts: int
    intermediate: int


class Shape(Read):
    """The model that experts were made for."""

    experts: int
    hidden: int
    intermediate: int
    layers: list[int]


class QuantizedManifest(Read):
    """manifest.json of a folder of quantized experts."""

    FORMAT: ClassVar = EXPERTS_FORMAT

    format: Annotated[str, _exactly(EXPERTS_FORMAT)]
    version: Annotated[int, _exactly(VERSION)]
    method: str
    key: dict[str, Any]
    """What it was made from, as far as known without reading the weights."""
    weights: str | None = None
    """Digest of all routed experts that it was made from; absent in folders of an earlier version."""
    model: Shape
    shards: dict[Annotated[str, Field(pattern=r"^layer-\d{5,6}\.safetensors$")], Shard]


class PackedKey(Read, extra="allow"):
    """What an entry was packed from; its other fields are compared as they are."""

    version: Annotated[int, _exactly(VERSION)]


class PackedManifest(Read):
    """manifest.json of an entry of the packed cache."""

    FORMAT: ClassVar = PACKED_FORMAT

    format: Annotated[str, _exactly(PACKED_FORMAT)]
    key: PackedKey
    made_from: str | None = Field(None, alias="from")
    shards: dict[str, PackedShard]

    @field_validator("shards")
    @classmethod
    def _are_named_by_their_layers(cls, shards: dict[str, PackedShard]) -> dict[str, PackedShard]:
        for name, shard in shards.items():
            if name != f"layer-{shard.layer:05d}.safetensors":
                raise ValueError(f"{name} is no name for layer {shard.layer}")
        return shards


AnyManifest = TypeVar("AnyManifest", QuantizedManifest, PackedManifest)


def read_manifest(file: Path, kind: type[AnyManifest], error: LaunchError) -> AnyManifest:
    """A valid manifest. Raises `error` if there is none; for one in another format, an error with the same place and
    fix that names the first mistake."""
    try:
        return kind.model_validate_json(read_regular(file))
    except OSError as failure:
        raise error from failure
    except ValidationError as failure:
        mistake = first_mistake(failure)
        problem = f"is of another format, expected {kind.FORMAT} version {VERSION} ({mistake})"
        raise LaunchError(error.where, problem, error.fix) if mistake else error from failure
