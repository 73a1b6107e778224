"""SGLang's own environment variables that affect the plan: one is honoured; others, which would disable our plugin or
make the model answer wrongly, are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kt_launch.planning.draft import Draft

LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
"""Lets SGLang serve longer contexts than the model was trained for."""
YES = ("true", "1", "yes", "y")
"""What SGLang accepts as true, in any case."""
PLUGIN, PLATFORM = "kt_sglang", "kt_cpu"
"""Names of our entry points, by which SGLang's variables select plugins."""


@dataclass(frozen=True)
class Variable:
    """A variable, and its values that no launch of ours accepts."""

    name: str
    refused: Callable[[str, Draft], bool]
    problem: str
    fix: str = "Unset it."


def _leaves_out(value: str, draft: Draft) -> bool:
    needed = {PLUGIN, PLATFORM} if draft.value("server.device") == "cpu" else {PLUGIN}
    return bool(value.strip(", ")) and not needed <= {name.strip() for name in value.split(",")}


def _is_true(value: str, draft: Draft) -> bool:
    return value.lower() in YES


VARIABLES = (
    Variable(
        "SGLANG_PLUGINS",
        _leaves_out,
        "it keeps SGLang from loading the plugin that runs the experts",
        f"Add {PLUGIN},{PLATFORM} to it, or unset it.",
    ),
    Variable(
        "SGLANG_PLATFORM",
        lambda value, _: value not in ("", PLATFORM),
        "with another platform SGLang does not load the plugin that runs the experts",
    ),
    Variable(
        "SGLANG_USE_CPU_ENGINE",
        lambda value, draft: value == "1" and draft.value("server.device") == "cpu",
        "with it SGLang asks for sgl_kernel's CPU operators, which this server does without",
    ),
    *(
        Variable(name, _is_true, "it replaces the router's choice of experts, so every answer would be wrong")
        for name in ("SGLANG_SIMULATE_UNIFORM_EXPERTS", "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS")
    ),
    Variable(
        "SGLANG_CPU_QUANTIZATION",
        _is_true,
        "with it SGLang quantizes the model's other weights as they are read, which the proof does not expect",
    ),
    Variable(
        "SGLANG_EXPERIMENTAL_LORA_OPTI",
        lambda value, draft: _is_true(value, draft) and draft.has_lora,
        "it replaces the layers through which adapters reach the experts",
    ),
    Variable(
        "SGLANG_GRPC_PORT",
        lambda value, _: True,
        "with it the server answers over gRPC too, where neither keys nor adapters' names are checked",
    ),
    Variable(
        "SGLANG_RUST_SERVER",
        _is_true,
        "with it another program answers requests, in which neither keys nor adapters' names are checked",
    ),
)


def check_environment(draft: Draft) -> None:
    """Refuse values that would start a server other than the planned one."""
    for variable in VARIABLES:
        value = draft.facts.environ.get(variable.name, "")
        if value and variable.refused(value, draft):
            draft.problems.add(variable.name, f"it is {value}: {variable.problem}", variable.fix)


def allows_longer_context(draft: Draft) -> bool:
    """Whether SGLang is told to accept longer contexts than the model was trained for."""
    return _is_true(draft.facts.environ.get(LONGER_CONTEXT, ""), draft)
