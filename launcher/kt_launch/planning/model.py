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
    facts = {"family": base.family.name, "num_experts": base.num_experts, "top_k": base.top_k}
    facts |= {"hidden_size": base.hidden_size, "moe_intermediate_size": base.moe_intermediate_size}
    facts |= {"moe_layers": len(base.moe_layers), "vocab_size": base.vocab_size}
    for name, value in facts.items():
        draft.set(f"model.{name}", value, f"probed: {base.path / 'config.json'}")
    if base.unread:
        files = ", ".join(base.unread)
        draft.warnings.append(f"model.path: not read, because they are not part of its weights: {files}")
    if draft.facts.disk is not None:
        draft.set("model.disk", draft.facts.disk.kind, "probed: the checkpoint's disk")


def check_name(draft: Draft, key: str, name: str) -> None:
    """Requests name models and adapters."""
    if not NAME.fullmatch(name):
        draft.problems.add(key, cannot_stand(name), f"Set {key}=<a plain name>.")
