"""adapter_config.json in PEFT's meaning: rank and scale of each module, and what is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kt_model.errors import LaunchError, Problems
from kt_model.importer.layouts import read_declared

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "biases on B",
    "modules_to_save": "whole modules next to the low-rank ones",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA, which starts in the middle of a prompt",
    "use_qalora": "QA-LoRA, pooled inputs",
    "use_bdlora": "block-diagonal LoRA",
    "fan_in_fan_out": "transposed weights",
    "arrow_config": "Arrow, a router over adapters",
    "kasa_config": "KaSA, singular values beside the low-rank part",
    "monteclora_config": "MonteCLoRA, sampled weights",
    "enable_lora": "low-rank pairs on parts of a fused matrix, as PEFT had them before 0.3",
}
"""Variants other than the plain low-rank update, by the key that requests them."""

READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "target_modules", "target_parameters", "peft_version", "base_model_name_or_path", "auto_mapping",
    "lora_A_layout", "lora_B_layout", "unsloth_fused_expert_lora",
})  # fmt: skip
"""Keys that are interpreted."""

HARMLESS = frozenset({
    # what was trained, which the tensors show
    "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "megatron_config",
    "megatron_core",
    # how it was trained: dropout, the backward pass, dtypes, learning rates (the last three are ms-swift's)
    "task_type", "inference_mode", "revision", "lora_dropout", "velora_config", "runtime_config", "merge_weights",
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_key_mapping",
    # how it started, of which init_lora_weights tells what matters, and a size that only QA-LoRA uses
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
})  # fmt: skip
"""Keys of PEFT up to 0.21 and of trainers whose values change nothing in what is read."""

PATTERN_S = 0.5
"""Time limit for matching one pattern with one name."""
SUSPECT = re.compile(
    r"use_\w+|\w*lora\w*|\w*(?:layout|scal|alpha|rank|bias|pattern|variant)\w*|(?!train|data|model|optim)\w+_config"
)
"""Parts of unknown keys' names that suggest a new variant that changes the product. Such keys are refused; other
unknown keys only cause a warning."""
AGAIN = "Save the adapter again."
LARGEST = 2**40
A_LAYOUT = "grouped_by_expert"
"""In every version of PEFT and Unsloth, A's rows are ordered (expert, rank)."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base unchanged; others move a part of it into the adapter."""


@dataclass(frozen=True)
class Settings:
    """One adapter's validated configuration."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...]
    peft_version: str
    unknown: tuple[str, ...]
    """Unknown keys that have a value; they are ignored."""
    b_layouts: Mapping[str, str]
    """Fused parameter -> order of B's columns, "" for all of them, as configured; see layouts.py."""

    def rank_of(self, module: str) -> int:
        """Rank of a module by its full name, patterns first."""
        return int(_look_up(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        return float(_look_up(self.alpha_pattern, module, self.alpha))

    def scale_of(self, module: str) -> float:
        """The factor of B·A. rsLoRA (https://arxiv.org/abs/2312.03732) divides by the square root of the rank."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilized else rank)


def _look_up(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first pattern that matches the end of the name after a dot, as PEFT matches. Raises LaunchError if one takes
    too long: an untrusted adapter may contain a pattern that never ends."""
    if not patterns:
        return default
    import regex

    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_S):
                return value
        except TimeoutError as failure:
            problem = f"the pattern {pattern!r} takes more than {PATTERN_S:g} s for the name {module}"
            raise LaunchError("adapter_config.json", problem, "Save the adapter with plain names.") from failure
    return default


def read_settings(where: str, config: Mapping[str, Any], problems: Problems) -> Settings | None:
    """The settings, or None if they cannot be used; every mistake is added to `problems`."""
    before = len(problems.errors)
    _refuse(where, config, problems)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        problems.add(where, f"adapter_config.json says r={rank!r}, but a positive integer is expected", AGAIN)
    if not _is_number(alpha):
        problems.add(where, f"adapter_config.json says lora_alpha={alpha!r}, but a number is expected", AGAIN)
    stabilized = config.get("use_rslora")
    if stabilized not in (None, True, False):
        problem = f"adapter_config.json says use_rslora={stabilized!r}, but true or false is expected"
        problems.add(where, problem, AGAIN)
    rank_pattern = _pattern(where, config, "rank_pattern", problems)
    alpha_pattern = _pattern(where, config, "alpha_pattern", problems)
    if len(problems.errors) > before:
        return None
    assert type(rank) is int
    return Settings(
        rank=rank,
        alpha=float(alpha),  # type: ignore[arg-type]
        rank_pattern={name: int(value) for name, value in rank_pattern.items()},
        alpha_pattern=alpha_pattern,
        rank_stabilized=bool(stabilized),
        target_parameters=_names(config.get("target_parameters")),
        target_modules=_names(config.get("target_modules")),
        peft_version=str(config.get("peft_version") or ""),
        unknown=tuple(key for key in _unknown(config) if not SUSPECT.fullmatch(key)),
        b_layouts=read_declared(config),
    )


def _refuse(where: str, config: Mapping[str, Any], problems: Problems) -> None:
    if config.get("peft_type") != "LORA":
        problems.add(where, f"peft_type is {config.get('peft_type')}, but LORA is expected", "Train a LoRA adapter.")
    unsupported = [f"{key} ({what})" for key, what in REFUSED.items() if config.get(key)]
    if config.get("bias", "none") not in ("none", None):
        unsupported.append(f"bias={config['bias']} (trained biases)")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={start} (a changed base model)")
    unsupported += [f"{name}={value} (rows of A in another order)" for name, value in _a_layouts(config)]
    suspect = [key for key in _unknown(config) if SUSPECT.fullmatch(key)]
    if suspect:
        problem = f"adapter_config.json has {', '.join(suspect)}, which is unknown and may change the result"
        problems.add(where, problem, "Merge the adapter into its base with PEFT; or take the key out if it does not.")
    if unsupported:
        problems.add(
            where,
            f"adapter_config.json asks for something that is not supported: {', '.join(unsupported)}",
            "Train with plain LoRA, or merge the adapter into its base with PEFT.",
        )


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """Unknown keys whose value is not empty."""
    known = {*READ, *REFUSED, *HARMLESS}
    return [str(key) for key, value in config.items() if value not in (None, False, "", [], {}) and key not in known]


def _a_layouts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Configurations in which A's rows are in an unsupported order."""
    name, detail = "lora_A_layout", config.get("unsloth_fused_expert_lora")
    declared = {name: config.get(name)}
    if isinstance(detail, dict):
        declared[f"unsloth_fused_expert_lora.{name}"] = detail.get(name)
    return [(key, str(value)) for key, value in declared.items() if value not in (None, A_LAYOUT)]


def _pattern(where: str, config: Mapping[str, Any], key: str, problems: Problems) -> dict[str, float]:
    found = config.get(key) or {}
    if problem := _pattern_mistake(found, of_ranks=key == "rank_pattern"):
        problems.add(where, f"adapter_config.json: {key} {problem}", AGAIN)
        return {}
    return {str(pattern): float(value) for pattern, value in found.items()}


def _pattern_mistake(found: Any, of_ranks: bool) -> str:
    """What is wrong with a key's value; '' if nothing is."""
    if not isinstance(found, dict) or not all(_is_number(value) for value in found.values()):
        return f"is {found!r}, but names with numbers are expected"
    for pattern, value in found.items():
        try:
            re.compile(pattern)
        except re.error:
            return f"has {pattern!r}, which is no regular expression"
        if of_ranks and (type(value) is not int or value < 1):
            return f"gives {pattern} rank {value!r}, but a positive integer is expected"
    return ""


def _is_number(value: Any) -> bool:
    """Finite (a comparison with NaN is false), and within bounds for any rank or alpha."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(item) for item in value) if isinstance(value, list) else ()
