"""The checkpoint: its path, its name, and what its config.json says of its experts."""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_model.flags import typed_flags
from kt_model.generation import DEFAULT_TEMPLATE, FILE
from kt_model.hubcache import BRANCH
from kt_model.request_names import NAME, cannot_stand

SAMPLING_DEFAULTS, NAMED_TEMPLATE = "--sampling-defaults", "--hf-chat-template-name"
"""SGLang's flags for what requests leave open, and for one of several chat templates."""


def resolve_model(draft: Draft) -> None:
    model, base = draft.facts.model, draft.facts.checkpoint
    if model is None:
        return
    check_name(draft, "model.name", model.name)
    draft.set("model.path", str(model.path), model.source)
    if model.commit:
        draft.keep("model.hub")
        draft.set("model.revision", model.commit, f"probed: {draft.config.model.revision or BRANCH} in the Hub's cache")
    draft.keep_or("model.name", model.name, "derived: the checkpoint's folder")
    if base is None:
        return
    facts = {"family": base.family.name, "num_experts": base.num_experts, "top_k": base.top_k}
    facts |= {"hidden_size": base.hidden_size, "moe_intermediate_size": base.moe_intermediate_size}
    facts |= {"moe_layers": len(base.moe_layers), "vocab_size": base.vocab_size}
    for name, value in facts.items():
        draft.set(f"model.{name}", value, f"probed: {base.path / 'config.json'}")
    _resolve_generation(draft)
    if base.unread:
        files = ", ".join(base.unread)
        draft.warnings.append(f"model.path: not read, because they are not part of its weights: {files}")
    if draft.facts.disk is not None:
        draft.set("model.disk", draft.facts.disk.kind, "probed: the checkpoint's disk")


def _resolve_generation(draft: Draft) -> None:
    """What answers get that requests leave open."""
    found, typed = draft.facts.generation, typed_flags(draft.config.server.extra_args)
    if found is None:
        return
    path, flag = draft.value("model.path"), SAMPLING_DEFAULTS
    if flag not in typed:
        known = found.sampling or found.greedy
        draft.set("model.sampling", found.shown, f"probed: {FILE}" if known else "default: OpenAI's")
    if found.unsound and flag not in typed:
        problem = f"{path}/{FILE} has {', '.join(found.unsound)}, which SGLang would refuse in every request"
        draft.problems.add("model.path", problem, f"Correct it, or set server.extra_args=[{flag},openai].")
    if found.templates and DEFAULT_TEMPLATE not in found.templates and NAMED_TEMPLATE not in typed:
        problem = f"the tokenizer of {path} has chat templates {', '.join(found.templates)}, none of them the default"
        fix = f"Set server.extra_args=[{NAMED_TEMPLATE},{found.templates[0]}], or another of them."
        draft.problems.add("model.path", problem, fix)
    if found.passed_over:
        names = ", ".join(found.passed_over)
        draft.warnings.append(f"model.path: {FILE} has {names}, by which SGLang does not write answers")
    if found.other_ends:
        ids = ", ".join(map(str, found.other_ends))
        draft.warnings.append(
            f"model.path: answers end at token {ids}, too, which config.json calls an end and {FILE} does not; "
            "transformers goes by the latter"
        )


def check_name(draft: Draft, key: str, name: str) -> None:
    """Requests name models and adapters."""
    if not NAME.fullmatch(name):
        draft.problems.add(key, cannot_stand(name), f"Set {key}=<a plain name>.")
