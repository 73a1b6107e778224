"""A folder of quantized experts: one shard per layer and a manifest. Reads and validates it; quantizing.py makes it.

Keys of a shard are layers.L.experts.E.{gate,up,down} and the same with _scale, in the arrays of
kt_kernels.quantize_expert, which are the same for every instruction set and number of pools.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError, command
from kt_model.methods import Method, method_of, short_name
from kt_model.tensors.header import TensorFile, read_header
from kt_model.tensors.stored import Float32, Stored
from kt_model.weights.manifests import QuantizedManifest, Shard, read_manifest

MANIFEST = "manifest.json"
KT_KERNEL_KEY = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)_exps\.\d+\.numa\.(\d{1,4})\.(?:weight|scale)")

Arrays = Mapping[str, npt.NDArray[Any]]
NUMPY: Mapping[str, Any] = {"U8": np.uint8, "I8": np.int8, "U16": np.uint16, "F32": np.float32}


def dequantized(method: Method, stored: npt.NDArray[Any], scale: npt.NDArray[Any], inputs: int) -> Float32:
    """The dequantized values of a matrix with this many inputs."""
    values = stored.astype(np.float32) if method.bits == 8 else _nibbles(stored)[:, :inputs]
    scales = scale[:, None] if method.group is None else _by_input(scale, method.group)[:, :inputs]
    return np.asarray(values * scales, np.float32)


def _nibbles(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Two inputs per byte, the even one in the low half, each value + 8."""
    low, high = (stored & 15).astype(np.int8) - 8, (stored >> 4).astype(np.int8) - 8
    return np.stack([low, high], axis=2).reshape(stored.shape[0], -1)


def _by_input(scale: npt.NDArray[Any], group: int) -> Float32:
    """The bits of bfloat16 scales, one for each input."""
    return Stored(scale, "BF16").float32().repeat(group, axis=1)


@dataclass(frozen=True)
class ExpertFolder:
    """A validated folder."""

    path: Path
    method: str
    """The method's short name."""
    manifest: QuantizedManifest

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards.values())


def shard_name(layer: int) -> str:
    """File of one layer."""
    return f"layer-{layer:05d}.safetensors"


def array_name(layer: int, expert: int, array: str) -> str:
    return f"layers.{layer}.experts.{expert}.{array}"


def read_folder(
    path: Path,
    method: str,
    base: Checkpoint | None,
    *,
    fingerprint: str | None = None,
    where: str = "kt.weight_path",
) -> ExpertFolder:
    """The folder, if it is complete and was made by this method for this base; reads no weights."""
    fix = "Run kt-launch quantize with the same model and kt.method."
    if not path.is_dir():
        raise LaunchError(where, f"no folder {path}", fix)
    if not (path / MANIFEST).is_file():
        raise LaunchError(where, f"{path} {describe_folder(path)}", _how_to_make_ours(base, method))
    manifest = _read_manifest(path / MANIFEST, fix)
    if manifest.method != method_of(method).sglang_name:
        holds = short_name(manifest.method)
        raise LaunchError(where, f"{path} holds {holds} experts, but kt.method is {short_name(method)}", fix)
    if base is not None:
        _check_base(path, manifest, base, fix)
    if fingerprint is not None and manifest.key.get("fingerprint") != fingerprint:
        raise LaunchError(str(path), f"was made from other weights than those of {base and base.path}", fix)
    for name, shard in manifest.shards.items():
        _check_shard(path / name, shard, fix)
    return ExpertFolder(path, method_of(method).name, manifest)


def _how_to_make_ours(base: Checkpoint | None, method: str) -> str:
    if base is None:
        return f"Run kt-launch quantize kt.method={short_name(method)} with the model that it is for."
    made = command("quantize", "model=auto", f"model.path={base.path}", f"kt.method={short_name(method)}")
    return f"Leave kt.weight_path out, and run {made} first."


def describe_folder(path: Path) -> str:
    """What a folder without a manifest is, in words."""
    pools = _kt_kernel_pools(path)
    if pools:
        parts = f"{pools} NUMA {'pool' if pools == 1 else 'pools'}"
        return f"was packed by kt-kernel for its own tiles and {parts}, which no other kernel reads"
    return f"has no {MANIFEST}: it is not a folder of quantized experts, or an incomplete one"


def _kt_kernel_pools(path: Path) -> int:
    """The number of NUMA pools for which kt-kernel packed the folder, in either of its layouts; 0 if kt-kernel did not
    make it."""
    for file in sorted(path.glob("*.safetensors")):
        pools = {int(match[1]) for name in read_header(file).tensors if (match := KT_KERNEL_KEY.fullmatch(name))}
        if pools:
            return max(pools) + 1
    return len({folder.name for folder in path.glob("_layer_*/_numa_*")})


def _read_manifest(path: Path, fix: str) -> QuantizedManifest:
    return read_manifest(path, QuantizedManifest, LaunchError(str(path), "is not a manifest of quantized experts", fix))


def _check_base(path: Path, manifest: QuantizedManifest, base: Checkpoint, fix: str) -> None:
    model = manifest.model
    made_for = (model.experts, model.hidden, model.intermediate, model.layers)
    here = (base.num_experts, base.hidden_size, base.moe_intermediate_size, list(base.moe_layers))
    missing = [layer for layer in base.moe_layers if shard_name(layer) not in manifest.shards]
    if made_for != here or missing:
        problem = f"was made for another base: {_shape(made_for)}; {base.path} has {_shape(here)}"
        raise LaunchError(str(path), problem, fix)


def _shape(facts: tuple[int, int, int, list[int]]) -> str:
    return f"{len(facts[3])} layers of {facts[0]} experts {facts[1]} x {facts[2]}"


def _check_shard(path: Path, shard: Shard, fix: str) -> None:
    if not path.is_file():
        raise LaunchError(str(path), "is missing, but the manifest lists it", fix)
    size = path.stat().st_size
    if size != shard.bytes:
        raise LaunchError(str(path), f"is {size} bytes, but the manifest says {shard.bytes}", fix)


def read_method(path: Path) -> str:
    """The method that a folder was made for, by its short name."""
    return str(short_name(_read_manifest(path / MANIFEST, "Run kt-launch quantize again.").method))


def verify_hashes(folder: ExpertFolder, sha256: Callable[[Path], str]) -> None:
    """Raise for the first shard that differs from what was written; `sha256` is usually that of Digests."""
    for name, shard in folder.manifest.shards.items():
        found = sha256(folder.path / name)
        if found != shard.sha256:
            problem = f"has SHA-256 {found[:16]}…, but the manifest says {shard.sha256[:16]}…"
            raise LaunchError(str(folder.path / name), problem, "Remove the folder and run kt-launch quantize.")


class LayerReader:
    """The arrays of one layer's experts, mapped."""

    def __init__(self, path: Path, layer: int) -> None:
        self._layer = layer
        self._file: TensorFile = read_header(path / shard_name(layer))
        self._data = np.memmap(self._file.path, dtype=np.uint8, mode="r")

    def expert(self, expert: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays that kt_kernels' load_quantized_expert expects."""
        found = {}
        for array in ("gate", "up", "down", "gate_scale", "up_scale", "down_scale"):
            name = array_name(self._layer, expert, array)
            tensor = self._file.tensors.get(name)
            if tensor is None or tensor.dtype not in NUMPY:
                raise LaunchError(str(self._file.path), f"no {name} in it", "Run kt-launch quantize again.")
            raw = self._data[self._file.data_start + tensor.start : self._file.data_start + tensor.end]
            found[array] = np.asarray(raw).view(NUMPY[tensor.dtype]).reshape(tensor.shape)
        return found
