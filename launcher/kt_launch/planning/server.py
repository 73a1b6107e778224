"""The server: its address, its backends, its limits, CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from kt_launch.machine.host import LOOPBACK
from kt_launch.machine.ports import Port
from kt_launch.planning.access import resolve_access
from kt_launch.planning.device import device_rules
from kt_launch.planning.draft import Draft
from kt_launch.planning.environment import LONGER_CONTEXT, allows_longer_context
from kt_launch.planning.sglang_differences import absent, attention_window, departures, yarn_reach
from kt_model.checkpoint import CONFIG, Checkpoint

CAPTURABLE: Mapping[str, Callable[[str | None], bool]] = {
    "server.attention_backend": lambda backend: backend != "torch_native",
    "server.lora_backend": lambda backend: backend == "triton",
}
"""Values that allow capturing decode steps."""
DEEPSEEK_MLA = (512, 64)
MLA_WIDTHS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "triton": (DEEPSEEK_MLA, (256, 32)),
    **dict.fromkeys(("flashinfer", "flashmla", "cutlass_mla", "trtllm_mla"), (DEEPSEEK_MLA,)),
}
"""Latent and rotary widths that the kernels of SGLang's attention backends support; others end in compiler or kernel
errors."""


def resolve_server(draft: Draft) -> None:
    draft.keep("server.host")
    resolve_access(draft)
    _resolve_port(draft)
    for name, backend in device_rules(draft).backends.items():
        chosen = f"derived: for device {draft.value('server.device')}"
        if name == "attention_backend" and backend is None and _needs_triton(draft):
            backend, (latent, rotary) = "triton", _latent_widths(draft)
            chosen = f"derived: latent attention of {latent} + {rotary}, others are made for 512 + 64"
        draft.keep_or(f"server.{name}", backend, chosen)
    _resolve_limits(draft)
    _check_window(draft)
    _resolve_graph(draft)
    _check_departures(draft)
    _check_latent(draft)


def _resolve_port(draft: Draft) -> None:
    port, wanted = draft.facts.port, draft.config.server.port
    source = "probed: a free port" if wanted == 0 else draft.sources.of("server.port")
    draft.set("server.port", port.number, source)
    if port.bad_host:
        problem = f"cannot listen on {draft.config.server.host} ({port.owner})"
        fix = "Use an address of this machine: 127.0.0.1, or 0.0.0.0 for all of its addresses."
        draft.problems.add("server.host", problem, fix)
    elif not port.free:
        problem = f"{wanted} on {draft.config.server.host} cannot be used: {port.owner}"
        draft.problems.add("server.port", problem, "Stop it, or set server.port=0 for a free port.")
    taken = {draft.config.server.port: "server.port"}
    for key, host, own in (
        ("server.metrics_port", draft.config.server.host, draft.facts.metrics_port),
        ("server.playground_port", LOOPBACK, draft.facts.playground_port),
        ("server.adapters_port", draft.config.server.host, draft.facts.adapters_port),
    ):
        _check_own_port(draft, key, host, own, taken)


def _check_own_port(draft: Draft, key: str, host: str, port: Port | None, taken: dict[int, str]) -> None:
    """For a page that the launcher itself serves. taken: port -> the key that has it."""
    if port is None or port.bad_host:
        return
    number = draft.given(key)
    fix = f"Set {key}=0 for a free port."
    if number and number in taken:
        draft.problems.add(key, f"{number} is {taken[number]} too", fix)
    elif not port.free:
        draft.problems.add(key, f"{number} on {host} cannot be used: {port.owner}", fix)
    taken.setdefault(number, key)


def _longest_context(limit: float | None, base: Checkpoint) -> float | None:
    """The device's limit, bounded by what the model was trained for and by its attention window."""
    window = attention_window(base)
    bounds = (limit, base.max_position if limit or window else None, window)
    return min((bound for bound in bounds if bound), default=None)


def _check_window(draft: Draft) -> None:
    base, context = draft.facts.checkpoint, draft.value("server.context_length")
    window = attention_window(base) if base else 0
    if base and context and 0 < window < context:
        problem = (
            f"{context} tokens, but its attention covers {window} (sliding_window in config.json), and SGLang's "
            f"{base.family.name} to all"
        )
        draft.problems.add("server.context_length", problem, f"Set server.context_length={window}.")


def _resolve_limits(draft: Draft) -> None:
    device, base = draft.value("server.device"), draft.facts.checkpoint
    for name, limit in device_rules(draft).limits.items():
        most = _longest_context(limit, base) if name == "context_length" and base else limit
        draft.keep_or(f"server.{name}", most, f"derived: for device {device}")
    context, requests = draft.value("server.context_length"), draft.value("server.max_running_requests")
    total = context * requests if device == "cpu" else None
    draft.keep_or("server.max_total_tokens", total, "derived: context_length x max_running_requests")
    if base and is_longer_context(draft):
        _tell_longer_context(draft, base.max_position)


def is_longer_context(draft: Draft) -> bool:
    """Whether contexts exceed what the model was trained for."""
    base, context = draft.facts.checkpoint, draft.value("server.context_length")
    return bool(base and base.max_position and context and context > base.max_position)


def _tell_longer_context(draft: Draft, most: int) -> None:
    """SGLang refuses it too, unless its own variable is set."""
    key, asked = "server.context_length", draft.value("server.context_length")
    if allows_longer_context(draft):
        excess = f"{asked} tokens, though the model was made for {most} ({LONGER_CONTEXT} is set)"
        draft.warnings.append(f"{key}: {excess}: answers beyond that are unreliable")
        return
    fix = f"Set {key}={most}; with {LONGER_CONTEXT}=1 in the environment it is served anyway, unreliably."
    if draft.facts.checkpoint and asked <= (reach := yarn_reach(draft.facts.checkpoint)):
        fix = f'Set {key}={most}, or write "max_position_embeddings": {reach} into config.json: YaRN reaches so far.'
    draft.problems.add(key, f"{asked} tokens, but the model was made for {most}", fix)


def _resolve_graph(draft: Draft) -> None:
    given, reason = draft.config.server.cuda_graph, _why_no_graph(draft)
    if given != "off" and reason is None:
        draft.set("server.cuda_graph", "decode", "derived: each start proves replayed steps against eager ones")
        return
    source = draft.sources.of("server.cuda_graph") if given == "off" else f"derived: {reason}"
    draft.set("server.cuda_graph", "off", source)
    if draft.expert_lora and given != "off" and draft.value("server.device") == "cuda":
        draft.warnings.append(f"server.cuda_graph: off, because {reason}")


def _why_no_graph(draft: Draft) -> str | None:
    """None if decode steps can be captured."""
    if draft.value("server.device") == "cuda":
        for key, capturable in CAPTURABLE.items():
            if not capturable(draft.value(key)):
                return f"{key}={draft.value(key)} is not known to run inside a CUDA graph"
        return None
    if draft.expert_lora:
        return "CPU experts cannot run inside a CUDA graph"
    return "routed experts run on the CPU"


def _check_departures(draft: Draft) -> None:
    """SGLang would serve such a model, and mostly answer wrongly without a warning; of one without its keys it ends."""
    base = draft.facts.checkpoint
    if base is None:
        return
    for problem in departures(base):
        draft.problems.add("model.path", problem, "Serve another checkpoint.")
    if lines := [json.dumps({key: value})[1:-1] for key, value in absent(base).items()]:
        names = ", ".join(absent(base))
        problem = f"{base.path / CONFIG} has no {names}, which SGLang's {base.family.name} asks for"
        draft.problems.add("model.path", problem, f"Add {', '.join(lines)} to it.")


def _latent_widths(draft: Draft) -> tuple[int, int]:
    """kv_lora_rank and qk_rope_head_dim; zeros if attention stores keys and values themselves."""
    base = draft.facts.checkpoint
    if base is None or not base.family.latent_cache or not base.config.get("kv_lora_rank"):
        return 0, 0
    return int(base.config["kv_lora_rank"]), int(base.config.get("qk_rope_head_dim") or 0)


def _needs_triton(draft: Draft) -> bool:
    widths = _latent_widths(draft)
    return widths != DEEPSEEK_MLA and widths in MLA_WIDTHS["triton"]


def _check_latent(draft: Draft) -> None:
    backend, (latent, rotary) = draft.value("server.attention_backend"), _latent_widths(draft)
    expected = MLA_WIDTHS.get(backend, ())
    if not latent or not expected or (latent, rotary) in expected:
        return
    problem = (
        f"{backend}, but the model's latent attention is {latent} + {rotary} wide, expected "
        f"{' or '.join(f'{one} + {other}' for one, other in expected)} (kv_lora_rank + qk_rope_head_dim)"
    )
    draft.problems.add("server.attention_backend", problem, "Choose another backend, or leave it out.")
