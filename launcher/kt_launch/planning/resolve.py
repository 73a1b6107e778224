"""From a config and the facts to the plan: every "auto" becomes a value with its source. Pure.

One file a subject, in the order of `resolve`; mistakes are collected and reported together.
"""

from __future__ import annotations

from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_launch.planning.adapters import resolve_adapters
from kt_launch.planning.checks import check_conflicts, check_names, resolve_fit
from kt_launch.planning.command import argv, environment
from kt_launch.planning.device import resolve_device
from kt_launch.planning.draft import Draft, Facts
from kt_launch.planning.environment import check_environment
from kt_launch.planning.experts import resolve_experts
from kt_launch.planning.gpu_prefill import resolve_gpu_prefill
from kt_launch.planning.model import resolve_model
from kt_launch.planning.proof import resolve_proof
from kt_launch.planning.ranks import resolve_ranks
from kt_launch.planning.server import resolve_server
from kt_launch.planning.threads import resolve_threads
from kt_model.errors import Problems
from kt_model.plan import LaunchPlan


def resolve(config: Config, facts: Facts, sources: Sources, problems: Problems) -> LaunchPlan:
    """The plan, or all mistakes together."""
    draft = Draft(config, facts, sources, problems)
    resolve_model(draft)
    resolve_adapters(draft)
    resolve_device(draft)
    resolve_ranks(draft)
    resolve_experts(draft)
    resolve_threads(draft)
    resolve_server(draft)
    resolve_gpu_prefill(draft)
    check_environment(draft)
    check_conflicts(draft)
    resolve_fit(draft)
    resolve_proof(draft)
    check_names(draft)
    problems.raise_if_any()
    return LaunchPlan(
        config=config.model_dump(mode="json"),
        resolved=draft.resolved,
        argv=argv(draft),
        env=environment(draft),
        warnings=tuple(draft.warnings),
    )
