"""action=merge: merges an adapter into a checkpoint, tensor by tensor.

Every tensor keeps its hub name and its type, except that fused experts become single ones, which every engine reads,
and float8 becomes bfloat16 without its scales. Sums are computed in float32 and rounded once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.atomic_file import disk_errors
from kt_model.checkpoint import EMBEDDING, HEAD, Checkpoint
from kt_model.digests import Digests, stamps_of
from kt_model.errors import LaunchError
from kt_model.experts import CONFIG, ExpertSource
from kt_model.families import expert_weights
from kt_model.float8 import FLOAT8, QUANTIZATION_KEYS, is_scale
from kt_model.generation import MORE_TEMPLATES
from kt_model.importer.files import iterate_files
from kt_model.importer.names import PROJECTIONS
from kt_model.importer.normal import Imported, Pair
from kt_model.installed import product
from kt_model.jsonfile import write_json
from kt_model.tensors.folder import ALONE, INDEX
from kt_model.tensors.stored import Float32, Stored, round_to_bfloat16
from kt_model.tensors.writer import ShardWriter, TensorSpec
from kt_model.weights.identity import require_unchanged
from kt_model.weights.progress import Bar
from kt_model.weights.staging import StagedFolder

MANIFEST = "kt_launch_merge.json"
LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", "hf_quant_config.json")
"""Suffixes of weights and of files that describe them; every other file of the checkpoint is copied."""
VERSION = 2
"""Of the manifest's key."""
BLOCK_BYTES = 1 << 24
"""Bytes of a float32 matrix that are merged at once."""


def merge(source: ExpertSource, imported: Imported | None, target: Path) -> bool:
    """Make the merged checkpoint; False if it already exists. Resumes an interrupted attempt. Without an adapter it is
    a copy with float8 converted to bfloat16."""
    base = source.base
    pairs = {tensor_name(pair, base): pair for pair in imported.pairs.values()} if imported else {}
    adapter = _adapter_key(imported) if imported else {}
    before = stamps_of(base.files)
    key: dict[str, Any] = {"base": _base_key(base), "adapter": adapter, "version": VERSION}
    untied = bool(base.stand_ins) and not pairs.keys().isdisjoint({EMBEDDING, HEAD})
    if untied:  # an adapter on one of the two must not change the other
        source.untie()
        key["untied"] = True
    with StagedFolder(target, key, MANIFEST) as staged:
        if staged.finished:
            return False
        shards = _shards(source)
        with Bar("merging", sum(source.size(name) for names in shards.values() for name in names)) as bar:
            for shard, names in shards.items():
                if shard in staged.pieces:
                    bar.skip(sum(source.size(name) for name in names))
                    continue
                staged.done(shard, _write_shard(source, names, pairs, staged.partial / shard, bar))
                bar.line(f"{shard}: {sum(name in pairs for name in names)} of {len(names)} tensors merged")
                source.forget()
        _write_rest(base, staged.partial, shards, untied)
        require_unchanged(source, before)
        staged.finish({"tool": product(), "base": base.path.name})
    return True


def tensor_name(pair: Pair, base: Checkpoint) -> str:
    """The base's tensor that a pair changes."""
    target = pair.target
    if target.kind == "routed_experts":
        assert target.layer is not None and target.expert is not None
        return expert_weights(base.family, target.layer, target.expert)[PROJECTIONS.index(target.projection)]
    name = f"{target.module}.weight" if target.module == "lm_head" else f"model.{target.module}.weight"
    return name if name in base.tensors else name.replace(".mlp.", ".block_sparse_moe.")


def _base_key(base: Checkpoint) -> dict[str, str]:
    """Everything from the base that a merged checkpoint depends on: digests of the weights files, read unless cached,
    and of the copied files."""
    files = (*base.files, *_copied_files(base.path))
    with Digests() as digests, Bar("reading", sum(file.stat().st_size for file in files)) as bar:
        return {_place(file, base.path): _digest(file, digests, bar) for file in files}


def _digest(file: Path, digests: Digests, bar: Bar) -> str:
    found = digests.sha256(file)
    bar.advance(file.stat().st_size)
    return found


def _adapter_key(imported: Imported) -> dict[str, str]:
    """Its files, and how they are read if that is a choice."""
    with Digests() as digests:
        files = {file.name: digests.sha256(file) for file in iterate_files(imported.path)}
    return files | ({"layout": str(imported.order)} if imported.order else {})


def _shards(source: ExpertSource) -> dict[str, list[str]]:
    """File name -> its tensors that the merged checkpoint has, in file order."""
    shards: dict[str, list[str]] = {}
    float8 = {name for name, found in source.located.items() if found.tensor.dtype == FLOAT8}
    for name, found in sorted(source.located.items(), key=lambda item: item[1].tensor.start):
        if not is_scale(name, float8):
            shards.setdefault(found.file.path.name, []).append(name)
    return {name: shards[name] for name in sorted(shards)}


def _write_shard(
    source: ExpertSource, names: list[str], pairs: Mapping[str, Pair], path: Path, bar: Bar
) -> dict[str, Any]:
    specs = [_spec_of(name, source) for name in names]
    with ShardWriter(path, specs, {"format": "pt"}) as writer:
        for one in specs:
            pair = pairs.get(one.name)
            writer.write_pieces(one.name, _copied(one, source) if pair is None else _merged(one, source, pair))
            bar.advance(source.size(one.name))
    return {"bytes": writer.bytes, "sha256": writer.sha256}


def _spec_of(name: str, source: ExpertSource) -> TensorSpec:
    tensor = source.located[name].tensor
    return TensorSpec(name, "BF16" if tensor.dtype == FLOAT8 else tensor.dtype, tensor.shape)


def _copied(one: TensorSpec, source: ExpertSource) -> Iterator[npt.NDArray[Any]]:
    """A tensor that no pair changes, piece by piece: its bytes unchanged, or float8 as bfloat16."""
    if source.located[one.name].is_transposed:
        for rows in _blocks(one.shape):
            yield source.stored(one.name, rows).array
        return
    if source.located[one.name].tensor.dtype == one.dtype:
        for start in range(0, one.size, BLOCK_BYTES):
            yield source.raw(one.name, slice(start, start + BLOCK_BYTES))
        return
    for rows in _blocks(one.shape):
        yield _rounded(source.float32(one.name, rows), one, source)


def _merged(one: TensorSpec, source: ExpertSource, pair: Pair) -> Iterator[npt.NDArray[Any]]:
    """W + ΔW, some rows at a time. An embedding is stored transposed: one row per token."""
    pair = pair.transposed() if one.name.endswith("embed_tokens.weight") else pair
    for rows in _blocks(one.shape):
        delta = pair.delta(slice(rows.start, rows.stop))
        yield _rounded(source.float32(one.name, rows) + delta, one, source)
    pair.forget()


def _blocks(shape: Sequence[int]) -> Iterator[range]:
    """Rows of a matrix, as many as BLOCK_BYTES hold."""
    step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    return (range(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _rounded(values: Float32, one: TensorSpec, source: ExpertSource) -> npt.NDArray[Any]:
    """In the file's type; a result that is not finite is refused."""
    found: npt.NDArray[Any] = values
    if one.dtype == "BF16":
        found = round_to_bfloat16(np.ascontiguousarray(values))
    elif one.dtype == "F16":
        with np.errstate(over="ignore"):
            found = values.astype(np.float16)
    if not Stored(found, one.dtype).is_finite():
        problem = f"{one.name} has NaN or infinity once it is merged into {one.dtype}"
        raise LaunchError(
            str(source.located[one.name].file.path), problem, "Get the file again, or train the adapter again."
        )
    return found


def _write_rest(base: Checkpoint, folder: Path, shards: Mapping[str, Iterable[str]], untied: bool) -> None:
    """Configuration, tokenizer and the like, and an index unless everything is in the single file that needs none."""
    with disk_errors(folder):
        for file in _copied_files(base.path):
            copy = folder / _place(file, base.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(file, copy)
        write_json(folder / CONFIG, _merged_config(base, untied))
        if list(shards) != [ALONE]:
            places = {name: shard for shard, names in shards.items() for name in names}
            total = sum((folder / shard).stat().st_size for shard in shards)
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _copied_files(folder: Path) -> list[Path]:
    """Files of the base that neither are weights nor describe them."""
    found = (file for file in folder.iterdir() if not file.name.endswith(LEFT_OUT) and not file.name.startswith("."))
    templates = (folder / MORE_TEMPLATES).glob("*.jinja")
    return sorted(file for file in (*found, *templates) if file.is_file())


def _place(file: Path, folder: Path) -> str:
    """Its name, in a folder of chat templates with that folder's name."""
    return f"{MORE_TEMPLATES}/{file.name}" if file.parent == folder / MORE_TEMPLATES else file.name


def _merged_config(base: Checkpoint, untied: bool) -> dict[str, Any]:
    config = {key: value for key, value in base.config.items() if key not in QUANTIZATION_KEYS}
    return {**config, "tie_word_embeddings": False} if untied else config
