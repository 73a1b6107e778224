"""The server's command and its environment."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence

from kt_launch.planning.access import key_arguments
from kt_launch.planning.device import device_rules
from kt_launch.planning.draft import INTERFACE_VARIABLES, Draft
from kt_launch.planning.environment import LONGER_CONTEXT
from kt_launch.planning.ranks import ranks_of
from kt_launch.planning.server import is_longer_context
from kt_model.adapters import AUTO_LAYOUT, LAYOUT_KEY, AdapterFacts
from kt_model.contract import (
    EXPERT_PROFILE,
    GPU_PREFILL,
    HANDOVER,
    LORA_OPTIONS,
    ORIGINS,
    PACKED_CACHE,
    PROCESS_CPUS,
    PROFILE,
    RANK0,
    RECORD_EXPERTS,
    SGLANG_CPUS,
    TP_EXPERTS,
)
from kt_model.methods import method_of
from kt_model.plan import SERVER_COMMAND
from kt_model.units import GIB

SERVER_FLAGS = {
    "server.host": "--host",
    "server.port": "--port",
    "server.device": "--device",
    "server.attention_backend": "--attention-backend",
    "server.sampling_backend": "--sampling-backend",
    "server.context_length": "--context-length",
    "server.max_total_tokens": "--max-total-tokens",
    "server.max_running_requests": "--max-running-requests",
    "server.chunked_prefill_size": "--chunked-prefill-size",
    "server.mem_fraction": "--mem-fraction-static",
}
JOINED = re.compile(r"--[\w-]+\s")
"""A flag and more in one word, as in `--log-level debug`."""
LOAD_FORMAT = "safetensors"
"""By default SGLang takes a folder with a consolidated*.safetensors and no model*.safetensors for Mistral's own format,
and reads files other than those in the index."""
CONFIG_PARSER = "hf"
"""By default SGLang looks for Mistral's params.json where eagle and mistral are words of the path."""
SGLANG_ADDRESS = "SGLANG_HOST_IP"
METRICS_FLAG = "--enable-metrics"
CAPTURED_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes of the decode steps that are captured. A batch between two sizes is padded to the larger one, which costs
the GPU almost nothing and the CPU nothing; each size adds seconds to the start."""
PROCESS_FLAGS = {
    "server.tp": "--tp-size",
    "server.dp": "--dp-size",
    "server.nodes": "--nnodes",
    "server.node_rank": "--node-rank",
    "server.rendezvous": "--dist-init-addr",
}
"""Only if they are in the plan: one process on one host needs none."""
EXPERT_FLAGS = {
    "kt.weight_path": "--kt-weight-path",
    "kt.method": "--kt-method",
    "kt.cpuinfer": "--kt-cpuinfer",
    "kt.threadpool_count": "--kt-threadpool-count",
    "kt.num_gpu_experts": "--kt-num-gpu-experts",
}
KEYS = {flag: key for key, flag in (SERVER_FLAGS | EXPERT_FLAGS).items()} | {
    "--model-path": "model.path",
    "--served-model-name": "model.name",
    "--trust-remote-code": "model.trust_remote_code",
    "--lora-paths": "lora.path",
    "--max-lora-rank": "lora.max_rank",
    "--max-loras-per-batch": "lora.max_per_batch",
    "--lora-target-modules": "lora.target_modules",
    "--lora-backend": "server.lora_backend",
    "--api-key": "server.api_key",
    "--admin-api-key": "server.admin_key",
    "--disable-decode-cuda-graph": "server.cuda_graph",
    "--cuda-graph-bs-decode": "server.cuda_graph",
}
"""Flag -> the key that sets it; the plan's other flags follow from the device and the adapters."""


def argv(draft: Draft) -> tuple[str, ...]:
    """The server's command: the plan's arguments, then the user's."""
    own = [*_model_arguments(draft), *_server_arguments(draft), *_expert_arguments(draft), *_adapter_arguments(draft)]
    extra = draft.config.server.extra_args
    for word in (word for word in extra if word.startswith("--")):
        _refuse_blanks(draft, word)
        _refuse_taken(draft, word.partition("=")[0], own)
    draft.problems.raise_if_any()
    return (sys.executable, *SERVER_COMMAND, *own, *extra)


def _refuse_blanks(draft: Draft, word: str) -> None:
    """SGLang would end of such a word, since it knows no flag with a blank in its name."""
    if JOINED.match(word):
        split = ",".join(word.split())
        problem = f"{word!r} is one word, but a flag and its value are two"
        draft.problems.add("server.extra_args", problem, f"Separate them by a comma: server.extra_args=[{split}].")


def _refuse_taken(draft: Draft, flag: str, own: Sequence[str]) -> None:
    """SGLang's parser accepts a unique prefix of a flag as the flag."""
    taken = next((each for each in own if each.startswith(flag)), None)
    if taken:
        problem = f"{flag} is set by the plan" if taken == flag else f"{flag} means {taken}, which the plan sets"
        fix = f"Set {KEYS[taken]}=<value> instead." if taken in KEYS else "Leave it out."
        draft.problems.add("server.extra_args", problem, fix)


def _model_arguments(draft: Draft) -> list[str]:
    words = ["--model-path", draft.value("model.path"), "--served-model-name", draft.value("model.name")]
    words += ["--dtype", "bfloat16", "--load-format", LOAD_FORMAT, "--model-config-parser", CONFIG_PARSER]
    return [*words, "--trust-remote-code"] if draft.config.model.trust_remote_code else words


def _server_arguments(draft: Draft) -> list[str]:
    given = {flag: draft.value(key) for key, flag in SERVER_FLAGS.items()}
    given |= {flag: draft.value(key) for key, flag in PROCESS_FLAGS.items() if key in draft.resolved}
    return [
        *(word for flag, value in given.items() if value is not None for word in (flag, str(value))),
        *key_arguments(draft),
        *_graph_arguments(draft),
        *device_rules(draft).arguments,
        *_metrics_arguments(draft),
    ]


def _graph_arguments(draft: Draft) -> list[str]:
    if draft.value("server.device") == "cpu":
        return []
    if draft.value("server.cuda_graph") == "off":
        return ["--disable-decode-cuda-graph"]
    return ["--cuda-graph-bs-decode", *map(str, CAPTURED_BATCHES)]


def _metrics_arguments(draft: Draft) -> list[str]:
    """SGLang's metrics appear on our metrics page next to our own if SGLang exports them."""
    wanted = draft.config.server.metrics_port is not None and METRICS_FLAG not in draft.config.server.extra_args
    return [METRICS_FLAG] if wanted else []


def _expert_arguments(draft: Draft) -> list[str]:
    values = {key: draft.value(key) for key in EXPERT_FLAGS}
    values["kt.method"] = method_of(values["kt.method"]).sglang_name
    return [word for key, flag in EXPERT_FLAGS.items() for word in (flag, str(values[key]))]


def _adapter_arguments(draft: Draft) -> list[str]:
    if not draft.has_lora:
        return []
    paths = [f"{adapter.name}={adapter.path}" for adapter in draft.facts.adapters]
    rank, batch = str(draft.value("lora.max_rank")), str(draft.value("lora.max_per_batch"))
    words = ["--enable-lora", *(["--lora-paths", *paths] if paths else [])]
    words += ["--max-lora-rank", rank, "--max-loras-per-batch", batch]
    words += ["--lora-target-modules", *draft.value("lora.target_modules")]
    return [*words, "--lora-backend", draft.value("server.lora_backend")]


def environment(draft: Draft) -> dict[str, str]:
    """What the device needs, and what the plugin needs before it reads the plan."""
    own = {**device_rules(draft).env, **_adapter_options(draft), **_profiling(draft), **_not_as_usual(draft)}
    own |= _residents(draft) | _processes(draft) | _network(draft) | _gpu_prefill(draft)
    if ranks_of(draft.config).first_has_experts:
        own[TP_EXPERTS] = RANK0
    if draft.config.server.origins:
        own[ORIGINS] = json.dumps(draft.config.server.origins)
    return {**own, LONGER_CONTEXT: "1"} if is_longer_context(draft) else own


def _adapter_options(draft: Draft) -> dict[str, str]:
    """Options that also apply to adapters loaded by the running server."""
    lora = draft.config.lora
    chosen = {
        "ignore": lora.ignore,
        "allow_missing": lora.allow_missing,
        "allow": draft.value("lora.allow") if "lora.allow" in draft.resolved else [],
        "layout": lora.layout if lora.layout != AUTO_LAYOUT else "",
        "layouts": {
            os.path.realpath(one.path): own
            for one in draft.facts.adapters
            if (own := _typed_layout(one)) != lora.layout
        },
    }
    chosen = {key: value for key, value in chosen.items() if value}
    return {LORA_OPTIONS: json.dumps(chosen)} if chosen else {}


def _typed_layout(adapter: AdapterFacts) -> str:
    return adapter.layout if adapter.layout_why == LAYOUT_KEY else AUTO_LAYOUT


def _profiling(draft: Draft) -> dict[str, str]:
    """Metrics include the time spent in experts, so the kernels must measure it."""
    return {PROFILE: "1"} if draft.config.server.metrics_port is not None else {}


def _residents(draft: Draft) -> dict[str, str]:
    """Which experts stay on the device, and where their use is counted."""
    files = {EXPERT_PROFILE: draft.value("kt.expert_profile"), RECORD_EXPERTS: draft.value("kt.record_experts")}
    return {name: path for name, path in files.items() if path}


def _processes(draft: Draft) -> dict[str, str]:
    """Each process's CPUs, if there are several processes; otherwise SGLang on a CPU would require a NUMA node for
    each."""
    if "server.processes" not in draft.resolved:
        return {}
    shares = "|".join(draft.value("server.processes"))
    return {PROCESS_CPUS: shares} | ({SGLANG_CPUS: shares} if draft.value("server.device") == "cpu" else {})


def _network(draft: Draft) -> dict[str, str]:
    """Hosts talk over the interface that leads to host 0. By default, torch and SGLang use the interface of the host's
    own name, which may be the loopback, or that of the default route."""
    route, known = draft.facts.route, draft.facts.environ
    if route is None:
        return {}
    wanted = {**dict.fromkeys(INTERFACE_VARIABLES, route.interface), SGLANG_ADDRESS: route.address}
    return {name: value for name, value in wanted.items() if name not in known}


def _not_as_usual(draft: Draft) -> dict[str, str]:
    """Options that differ from the plugin's defaults."""
    own = {PACKED_CACHE: draft.value("kt.packed_cache"), HANDOVER: draft.value("kt.handover")}
    return {name: value for name, value in own.items() if value not in (None, "auto")}


def _gpu_prefill(draft: Draft) -> dict[str, str]:
    """From how many tokens on experts are streamed to the GPU, and through how large a buffer."""
    tokens, size = draft.value("kt.gpu_prefill_tokens"), draft.value("kt.gpu_prefill_gib")
    if tokens == "off":
        return {}
    asked = {"tokens": None if tokens == "auto" else tokens, "bytes": int(size * GIB) if size else None}
    return {GPU_PREFILL: json.dumps(asked)}
