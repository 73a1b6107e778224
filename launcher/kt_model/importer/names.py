"""Interprets the keys of an adapter file: the module, its side (A or B), and that module's position in the model.

Data, not branches: wrapper names that tools leave, refused keys, and the module names of a MoE model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

KEY = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
NAMED_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.(?!weight\.)(?P<adapter>[^.]+)\.weight")
"""With the adapter's name in it, as in a model's own state; save_pretrained removes it."""
COPY = re.compile(r"(?P<path>.*(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")
"""A whole embedding, which PEFT saves beside the pairs on it."""
WHOLE = "whole"
"""The side of such a key."""

WRAPPERS: Mapping[str, str] = {
    "_fsdp_wrapped_module": "torch.distributed.fsdp",
    "_checkpoint_wrapped_module": "torch's activation checkpointing",
    "_orig_mod": "torch.compile",
    "module": "DataParallel, DistributedDataParallel, DeepSpeed",
    "_forward_module": "Lightning Fabric",
    "_fpw_module": "FairScale's FullyShardedDataParallel",
    "orig_module": "KT's training",
    "original_moe": "KT's training",
}
"""Name parts left by trainers' module wrappers, anywhere in a name, and which tool leaves them; they mean nothing."""
OUTER = frozenset({"base_model", "model", "language_model", "pretrained_model"})
"""Prefixes of models around the layers, once or more: PEFT's, transformers', vision models', TRL's."""
OTHER_NAMES: Mapping[str, str] = {"unembed_tokens": "lm_head"}
"""Modules outside of layers for which Tinker has its own names."""

FOREIGN: Mapping[str, str] = {
    "lora_magnitude_vector": "magnitudes of DoRA",
    "modules_to_save": "whole modules",
    "original_module": "whole modules",
    "lora_variant": "variants of LoRA",
    ".bias": "biases",
}
"""Parts of keys that are refused."""
UNKNOWN_KEY = "unknown keys"
UNKNOWN_MODULE = "modules that the base does not have"

MODULE_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "routed_experts",
        re.compile(r"(?:mlp|block_sparse_moe|mixer|feed_forward)\.experts\.(?P<expert>\d+)\.(?P<projection>\w+)"),
    ),
    (
        "stacked_experts",
        re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)"),
    ),
    ("fused_experts", re.compile(r"(?:mlp|block_sparse_moe)\.experts(?P<inner>(?:\.base_layer)*)")),
    ("shared_experts", re.compile(r"mlp\.shared_experts?\.(?P<projection>\w+)|mlp\.shared_expert_gate")),
    ("router", re.compile(r"(?:mlp|block_sparse_moe)\.(?:gate|router)")),
    ("attention", re.compile(r"self_attn\.(?P<projection>\w+)")),
    ("dense_mlp", re.compile(r"mlp\.(?P<projection>\w+)")),
)
"""The kind of module by the rest of its name after `layers.L.`; the first full match counts."""

GATE_UP_DOWN: Mapping[str, str] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class BaseModule:
    """One module of a model. kind: routed_experts, shared_experts, attention, dense_mlp, router, embeddings."""

    kind: str
    layer: int | None
    module: str
    """The base's name for it, below `model.`: layers.1.self_attn.o_proj. Routed experts always have gate, up, down."""
    expert: int | None = None
    projection: str = ""


@dataclass(frozen=True)
class Key:
    """A parsed key. side: A, B or WHOLE. inner: number of base_layer in the name of fused experts."""

    text: str
    side: str
    target: BaseModule
    module: str
    """The module's name, the same for all spellings of it."""
    peft_module: str
    """PEFT's name for it while it trained, which its patterns are matched against."""
    fused: bool = False
    inner: int = 0
    stacked: bool = False
    """Whether it holds one projection of all experts of a layer in three dimensions."""


def read_key(text: str) -> Key | str:
    """The parsed key, or why it is refused."""
    for part, what in FOREIGN.items():
        if part in text:
            return what
    name = ".".join(part for part in text.split(".") if part not in WRAPPERS)
    copy = COPY.fullmatch(name)
    match = copy or KEY.fullmatch(name) or NAMED_KEY.fullmatch(name)
    if match is None:
        return UNKNOWN_KEY
    found = _split(match["path"].split("."))
    if found is None:
        return UNKNOWN_MODULE
    layer, rest = found
    peft_module = _peft_module(match["path"].split("."))
    if layer is None:
        return Key(text, WHOLE if copy else match["side"], BaseModule("embeddings", None, rest), rest, peft_module)
    return _in_layer(text, match["side"], layer, rest, peft_module) or UNKNOWN_MODULE


def _peft_module(parts: list[str]) -> str:
    """Without what saving puts before it, and what nesting puts behind it."""
    while parts[:2] == ["base_model", "model"] or parts[:1] == ["pretrained_model"]:
        parts = parts[1 if parts[0] == "pretrained_model" else 2 :]
    while parts[-1:] == ["base_layer"]:
        parts = parts[:-1]
    bare = parts[:1] in (["layers"], ["embed_tokens"])
    return ".".join(["model", *parts] if bare else parts)


def _split(parts: list[str]) -> tuple[int | None, str] | None:
    """Layer and the name inside it; no layer for names outside of all layers."""
    while parts and parts[0] in OUTER:
        parts = parts[1:]
    if len(parts) == 1 and OTHER_NAMES.get(parts[0], parts[0]) in ("embed_tokens", "lm_head"):
        return None, OTHER_NAMES.get(parts[0], parts[0])
    if len(parts) < 3 or parts[0] != "layers" or not (parts[1].isascii() and parts[1].isdigit()) or len(parts[1]) > 6:
        return None
    return int(parts[1]), ".".join(parts[2:])


def _in_layer(text: str, side: str, layer: int, rest: str, peft_module: str) -> Key | None:
    for kind, pattern in MODULE_KINDS:
        match = pattern.fullmatch(rest)
        if match is None:
            continue
        groups = match.groupdict()
        if kind == "fused_experts":
            module = f"model.layers.{layer}.{rest.partition('.base_layer')[0]}"
            target = BaseModule("routed_experts", layer, "")
            return Key(text, side, target, module, peft_module, fused=True, inner=groups["inner"].count("base_layer"))
        if kind == "stacked_experts":
            target = BaseModule("routed_experts", layer, "", projection=GATE_UP_DOWN[groups["projection"]])
            return Key(text, side, target, f"model.layers.{layer}.{rest}", peft_module, stacked=True)
        if kind == "routed_experts":
            return _of_expert(text, side, layer, rest, groups, peft_module)
        target = BaseModule(kind, layer, f"layers.{layer}.{rest}", projection=groups.get("projection") or "")
        return Key(text, side, target, f"model.layers.{layer}.{rest}", peft_module)
    return None


def _of_expert(text: str, side: str, layer: int, rest: str, groups: Mapping[str, str], peft_module: str) -> Key | None:
    projection = GATE_UP_DOWN.get(groups["projection"])
    if projection is None or len(groups["expert"]) > 6:
        return None
    target = expert_module(layer, int(groups["expert"]), projection)
    return Key(text, side, target, f"model.layers.{layer}.{rest}", peft_module)


def expert_module(layer: int, expert: int, projection: str) -> BaseModule:
    """The position of one projection of one routed expert, whatever the family calls it."""
    return BaseModule("routed_experts", layer, f"layers.{layer}.experts.{expert}.{projection}", expert, projection)
