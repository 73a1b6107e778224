"""Reads the facts of a checkpoint: config.json and the headers of its safetensors files. Reads no weights, imports no
torch.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError, quoted, shown
from kt_model.families import Family, expert_weights, kv_values, moe_layers
from kt_model.float8 import FLOAT8, METHODS, block_size, quantization_of, scale_form, scale_of
from kt_model.hubnames import Experts, under_hub_names
from kt_model.modelconfig import CONTEXT_KEYS, read_model_config
from kt_model.tensors.folder import Located, locate_tensors, unread_files
from kt_model.tensors.header import BITS, Tensor
from kt_model.training import ADAPTER_CONFIG
from kt_model.user_paths import advice

LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERT_DTYPES = ("BF16", "F16", "F32")
COUNTED = ("llama3", "yarn")
"""Types of rope_scaling whose factor max_position_embeddings includes."""
CONFIG, GGUF = "config.json", ".gguf"
OTHER_FILES = "Choose a folder of safetensors files; GGUF is not read."


@dataclass(frozen=True)
class Checkpoint:
    """The facts of a Mixture-of-Experts checkpoint."""

    path: Path
    family: Family
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    shared_experts: int
    kv_values: int
    """Values that attention caches per token in one layer."""
    vocab_size: int
    max_position: int
    """Tokens that the model was trained for, as SGLang counts them; 0 if config.json does not say."""
    rope_type: str
    tied: bool
    """Whether config.json ties the output head to the embedding."""
    shared_out: Mapping[str, int]
    """Numbers in config.json that tensor-parallel ranks divide among them: heads and inner widths."""
    expert_dtype: str
    float8_block: tuple[int, int]
    """Rows and columns of a float8 weight that share a scale, if scales are per block."""
    config: Mapping[str, Any] = field(repr=False)
    """config.json."""
    located: Mapping[str, Located] = field(repr=False)
    """Every tensor that is read, by its hub name."""

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return {name: found.tensor for name, found in self.located.items()}

    @functools.cached_property
    def stored_otherwise(self) -> Mapping[str, list[str]]:
        """Name in a file -> hub names of its parts, if these differ."""
        found: dict[str, list[str]] = {}
        for name, place in self.located.items():
            if place.stored != name:
                found.setdefault(place.stored, []).append(name)
        return found

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(sorted({found.file.path for found in self.located.values()}))

    @functools.cached_property
    def unread(self) -> list[str]:
        """Names of other safetensors files in the folder, which are not part of its weights."""
        return unread_files(self.path, self.files)

    @functools.cached_property
    def stand_ins(self) -> Mapping[str, str]:
        """Tensor that is not stored -> the one whose values it has, for a tied embedding and output head. If both are
        stored, each has its own values, whatever config.json says; transformers does the same."""
        pairs = ((HEAD, EMBEDDING), (EMBEDDING, HEAD)) if self.tied else ()
        return {name: other for name, other in pairs if name not in self.located and other in self.located}

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts in bfloat16."""
        one = 3 * self.hidden_size * self.moe_intermediate_size * BITS["BF16"] // 8
        return one * self.num_experts * len(self.moe_layers)

    @functools.cached_property
    def other_bytes(self) -> int:
        """Bytes of everything that is served except routed experts, as stored."""
        experts = len(self.moe_layers) * self.num_experts * 3 * self.hidden_size * self.moe_intermediate_size
        tied = sum(self.tensors[other].end - self.tensors[other].start for other in self.stand_ins.values())
        return self._stored("") + tied - experts * BITS[self.expert_dtype] // 8

    @functools.cached_property
    def latent_projection_bytes(self) -> int:
        """Bytes of MLA's kv_b_proj, as stored."""
        return self._stored("kv_b_proj")

    def _stored(self, part: str) -> int:
        """Bytes of the tensors with `part` in their names. Layers after the last one, which DeepSeek-V3 and GLM-4 have
        to predict a further token, are for speculation, and SGLang does not load them."""
        total = 0
        for name, tensor in self.tensors.items():
            layer = LAYER.match(name)
            if part in name and (layer is None or int(layer[1]) < self.num_layers):
                total += tensor.end - tensor.start
        return total


def read_checkpoint(path: Path, where: str = "model.path", *, float8: bool = False) -> Checkpoint:
    """The facts; raises LaunchError if something is wrong with the checkpoint. where: the key that names it.

    float8: accept experts in float8, which can be quantized or merged but not served directly.
    """
    require_config(path, where)
    config, family = read_model_config(path / "config.json", where)
    facts = facts_of(config, family, path / "config.json")
    experts = Experts(family, facts["num_experts"], facts["hidden_size"], facts["moe_intermediate_size"])
    located = under_hub_names(locate_tensors(path, where), experts)
    first = expert_weights(family, facts["moe_layers"][0], 0)[0]
    dtype = located[first].tensor.dtype if first in located else ""
    base = Checkpoint(path=path, expert_dtype=dtype, located=located, **facts)
    _require_readable(base, where, first, float8)
    _validate_experts(base, (*EXPERT_DTYPES, FLOAT8) if float8 else EXPERT_DTYPES)
    return base


def facts_of(config: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    """The facts from config.json, by their names in Checkpoint. Raises LaunchError."""
    layers = _moe_layers(family, config, file)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {
        "family": family,
        "architecture": str((config.get("architectures") or [""])[0]),
        "num_layers": int(config["num_hidden_layers"]),
        "moe_layers": layers,
        "num_experts": _number(config, _experts_key(family, config), file),
        "top_k": _top_k(family, config, file),
        "hidden_size": _number(config, "hidden_size", file),
        "moe_intermediate_size": _number(config, family.intermediate_key, file),
        "shared_experts": _shared_experts(family, config),
        "kv_values": kv_values(family, config),
        "vocab_size": int(config.get("vocab_size") or 0),
        "max_position": _max_position(config, rope),
        "rope_type": rope_type_of(rope),
        "tied": bool(config.get("tie_word_embeddings")),
        "shared_out": _shared_out(family, config, dense=len(layers) < int(config["num_hidden_layers"])),
        "float8_block": block_size(config, file),
        "config": config,
    }


def _shared_out(family: Family, config: Mapping[str, Any], dense: bool) -> dict[str, int]:
    keys = ["num_attention_heads", family.intermediate_key, family.shared_width_key]
    keys += ["intermediate_size"] if dense else []
    return {key: int(config[key]) for key in keys if config.get(key)}


def _max_position(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """The first of CONTEXT_KEYS that is given, times the rotary embedding's factor, unless the number already includes
    it. Of types in COUNTED transformers 5 takes max_position_embeddings for the original number if that is missing, so
    that SGLang always finds one."""
    most = next((config[key] for key in CONTEXT_KEYS if config.get(key) is not None), 0)
    counted = "original_max_position_embeddings" in rope or rope_type_of(rope) in COUNTED
    return int(most * (1 if counted else rope.get("factor") or 1))


def rope_type_of(rope: Mapping[str, Any]) -> str:
    """By its new or old key."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def require_folder(path: Path, where: str, whose: str) -> None:
    """Raises LaunchError if there is no such folder; suggests the folder of a file."""
    if path.is_file():
        problem = f"{path} is a file, but {whose} folder is expected"
        folder = f"Set {quoted(f'{where}={path.parent}')}."
        raise LaunchError(where, problem, OTHER_FILES if path.suffix == GGUF else folder)
    if not path.is_dir():
        raise LaunchError(where, f"no folder {path}, but {whose} folder is expected", advice(path, where))


def require_config(path: Path, where: str) -> None:
    """Raises LaunchError unless it is a folder with a config.json; names subfolders that have one."""
    require_folder(path, where, "a checkpoint")
    if (path / CONFIG).exists():
        return
    inside = sorted(found.parent for below in ("*", "snapshots/*") for found in path.glob(f"{below}/{CONFIG}"))
    if (path / ADAPTER_CONFIG).is_file():
        fix = f"It is an adapter: set {quoted(f'lora={path}')}, and {where} to its base model."
    elif inside:
        others = f" (there are also {shown([each.name for each in inside[1:]])})" if inside[1:] else ""
        fix = f"Set {quoted(f'{where}={inside[0]}')}{others}."
    else:
        fix = "Choose a folder that has one."
    raise LaunchError(where, f"{path} has no {CONFIG}", fix)


def _require_readable(base: Checkpoint, where: str, weight: str, float8: bool) -> None:
    """Raise for a quantized checkpoint, unless it is float8 and that is accepted. weight: a representative weight."""
    quantization = quantization_of(base.config)
    method = str(quantization.get("quant_method", "unknown"))
    may_be_float8 = method in METHODS and base.expert_dtype in (*EXPERT_DTYPES, FLOAT8)
    if not quantization or (float8 and may_be_float8):
        return
    fix = "Use the bfloat16 checkpoint of this model."
    if may_be_float8 and _is_scaled(weight, base.tensors, base.float8_block):
        copy = shlex.join(["lora=none", f"model.path={base.path}", f"merge.path={base.path}-BF16"])
        fix = f"Use the bfloat16 checkpoint of this model; kt-launch merge model=auto {copy} makes it."
    raise LaunchError(where, f"the checkpoint is quantized ({method})", fix)


def _is_scaled(weight: str, tensors: Mapping[str, Tensor], block: tuple[int, int]) -> bool:
    """Whether a float8 weight has a scale that kt-launch merge supports."""
    scale = scale_of(weight, tensors)
    if scale is None or tensors[weight].dtype != FLOAT8 or len(tensors[weight].shape) != 2:
        return False
    return scale_form(tensors[scale].shape, tensors[weight].shape, block) is not None


def _moe_layers(family: Family, config: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    _number(config, "num_hidden_layers", file)
    layers = moe_layers(family, config)
    if not layers:
        raise LaunchError(str(file), "no layer has routed experts", "Serve a dense model with SGLang itself.")
    return layers


def _experts_key(family: Family, config: Mapping[str, Any]) -> str:
    new = family.new_experts_key
    return new if new and family.experts_key not in config and new in config else family.experts_key


def _number(config: Mapping[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise LaunchError(str(file), f"{key} is {value!r}, but a positive integer is expected", "Get the file again.")
    return value


def _top_k(family: Family, config: Mapping[str, Any], file: Path) -> int:
    chosen, experts = _number(config, family.top_k_key, file), _number(config, _experts_key(family, config), file)
    if chosen > experts:
        problem = f"{family.top_k_key} is {chosen}, but a layer has {experts} experts"
        raise LaunchError(str(file), problem, "Get the file again.")
    return chosen


def _shared_experts(family: Family, config: Mapping[str, Any]) -> int:
    if family.shared_key:
        return int(config.get(family.shared_key) or 0)
    return 1 if family.shared_width_key and config.get(family.shared_width_key) else 0


def _validate_experts(base: Checkpoint, dtypes: tuple[str, ...]) -> None:
    wide = (base.moe_intermediate_size, base.hidden_size)
    shapes = (wide, wide, wide[::-1])
    for layer in base.moe_layers:
        for expert in range(base.num_experts):
            for name, shape in zip(expert_weights(base.family, layer, expert), shapes, strict=True):
                _validate_expert_weight(base, name, shape, dtypes)


def _validate_expert_weight(base: Checkpoint, name: str, shape: tuple[int, int], dtypes: tuple[str, ...]) -> None:
    where, tensor = str(base.path), base.tensors.get(name)
    if tensor is None:
        problem = f"no tensor {name}, but config.json declares it"
        raise LaunchError(where, problem, "Download the whole checkpoint again.")
    if tensor.shape != shape:
        problem = f"{name} has shape {list(tensor.shape)}, but config.json declares {list(shape)}"
        raise LaunchError(where, problem, "Get config.json and the safetensors files from the same source.")
    if tensor.dtype not in dtypes:
        problem = f"{name} has dtype {tensor.dtype}, expected one of {', '.join(dtypes)}"
        raise LaunchError(where, problem, "Use the bfloat16 checkpoint of this model.")
