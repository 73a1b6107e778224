"""The checkpoint: its path, its name, and what its config.json says of its experts."""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_model.hubcache import BRANCH
from kt_model.request_names import NAME, cannot_stand


def resolve_model(draft: Draft) -> None:
    model, base = draft.facts.model, draft.facts.checkpoint
    if model is None:
        return
    check_name(draft, "model.name", model.name)
    draft.set("model.path", str(model.path), model.source)
    if model.commit:
        draft.set("model.hub", draft.config.model.hub, draft.sources.of("model.hub"))
        draft.set("model.revision", model.commit, f"probed: {draft.config.model.revision or BRANCH} in the Hub's cache")
    given = draft.config.model.name
    draft.given_or("model.name", given, model.name, "derived: the checkpoint's folder")
    if base is None:
        return
    probed = f"probed: {base.path / 'config.json'}"
    draft.set("model.family", base.family.name, probed)
    draft.set("model.num_experts", base.num_experts, probed)
    draft.set("model.top_k", base.top_k, probed)
    draft.set("model.hidden_size", base.hidden_size, probed)
    draft.set("model.moe_intermediate_size", base.moe_intermediate_size, probed)
    draft.set("model.moe_layers", len(base.moe_layers), probed)
    draft.set("model.vocab_size", base.vocab_size, probed)
    if base.unread:
        draft.warnings.append(
            f"model.path: not read, because they are not part of its weights: {', '.join(base.unread)}"
        )
    if draft.facts.disk is not None:
        draft.set("model.disk", draft.facts.disk.kind, "probed: the checkpoint's disk")


def check_name(draft: Draft, key: str, name: str) -> None:
    """Requests name models and adapters."""
    if not NAME.fullmatch(name):
        draft.problems.add(key, cannot_stand(name), f"Set {key}=<a plain name>.")
