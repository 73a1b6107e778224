"""Proof that this plan's experts and adapters are the ones that answer, made before a server is called ready.

Three kinds of evidence: each scheduler process reports which of our classes are in place and what went through
kt_kernels; base and adapter must give different first-token logprobs for the same prompt; and what they compute is
compared with a shipped text and the model in float32, and each id that clients may name with its own side (proving/).
With data-parallel replicas, each replica is checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import httpx

from kt_launch.proving.content import Content
from kt_launch.proving.generate import generate
from kt_launch.proving.names import Names, check_names
from kt_model.acceptance import NOISE_FACTOR, PROMPT, SMALLEST_DIFFERENCE, TOP_LOGPROBS, difference
from kt_model.contract import NO_ADAPTER, RANK0, REPORT, LayerReport, Report, computes_nothing
from kt_model.cpulist import show_cpu_list
from kt_model.errors import ProofFailed
from kt_model.methods import method_of
from kt_model.plan import LaunchPlan

BASE_SLOT = str(NO_ADAPTER)
OF_THIS_START, NOT_SEEN = "a process of this start", "not seen from here which process listens on"
TP_EXPERTS_KEY = "kt.tp_experts"


@dataclass(frozen=True)
class Proof:
    """The findings. difference: per adapter, the largest |Δ logprob| of the first token against the base."""

    layers: int
    experts_a_layer: int
    isa: str
    method: str
    replicas: int
    schedulers: int
    """Scheduler processes: the ranks of all replicas."""
    computing: int
    """Those of them that compute CPU experts; the others add zeros to what these give."""
    noise: float
    difference: dict[str, float] = field(default_factory=dict)
    reference_error: dict[str, float] = field(default_factory=dict)
    """Largest relative L2 error of `base` and of any `adapter`, as recomputed inside the scheduler."""
    replay_difference: dict[str, float] | None = None
    """Per side, the largest |Δ logprob| of a token between a replayed and an eager step; None if graphs are off."""
    prefill: dict[str, Any] | None = None
    """The findings of proving/prefill.py, and its sentences; None if it is switched off."""
    prefill_lines: tuple[str, ...] = ()
    mapped_layers: int = 0
    """How many layers came from the packed cache."""
    packed_entry: str | None = None
    cache_problem: str | None = None
    content: Content | None = None
    names: Names | None = None
    """The ids that clients may name."""
    listener: str = ""
    """Whose process listens on the server's port: OF_THIS_START, or NOT_SEEN and where; '' where nobody has looked."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = asdict(replace(self, content=None))
        return {**plain, "content": self.content.as_dict() if self.content else None}

    def lines(self) -> list[str]:
        """Sentences for the terminal."""
        each = f" in each of {self.schedulers} scheduler processes" if self.schedulers > 1 else ""
        if self.computing < self.schedulers:
            each = f" in {self.computing} of {self.schedulers} scheduler processes; the others gave zeros to their sums"
        lines = [
            f"{self.layers} MoE layers x {self.experts_a_layer} experts ran in kt_kernels ({self.method}, {self.isa})"
            f"{each}"
        ]
        lines += [
            f"adapter {name} acts: first-token logprobs differ from the base by {value:.3g} (noise: {self.noise:.1g})"
            for name, value in self.difference.items()
        ]
        lines += [self.names.line()] if self.names else []
        if self.mapped_layers:
            lines.append(f"{self.mapped_layers} layers are mapped from the packed cache: {self.packed_entry}")
        if self.cache_problem:
            lines.append(f"warning: packed cache: {self.cache_problem}")
        lines += [
            f"{side} matches one token recomputed in float32: relative L2 error {value:.1e}"
            for side, value in self.reference_error.items()
        ]
        lines += self.prefill_lines
        if self.listener.startswith(NOT_SEEN):
            lines.append(f"{self.listener}; its answers bear the number of this start")
        return lines + self._replay_lines() + (self.content.lines() if self.content else [])

    def _replay_lines(self) -> list[str]:
        if self.replay_difference is None:
            return []
        if not self.replay_difference:
            return ["warning: server.cuda_graph: SGLang replays no decode step on this device; its log says why"]
        worst = ", ".join(f"{side} {value:.2g}" for side, value in self.replay_difference.items())
        return [f"replayed decode steps match eager steps: largest difference of a logprob: {worst}"]


def prove(plan: LaunchPlan, client: httpx.Client) -> Proof:
    """Checks the running server. Raises ProofFailed saying what was checked and what was found instead."""
    replicas = range(len(replica_reports(client)))
    bases = ask_replicas(client, None, replicas)
    noise = max(map(difference, bases, ask_replicas(client, None, replicas)))
    states = scheduler_reports(client)
    _check_processes(plan, states)
    _check_computing(plan, states)
    for state in states:
        _check_layers(plan, state)
    for state in computing_of(states):
        _check_reference(state)
    differences = {}
    for name in plan.adapters:
        before = _adapter_tokens(states)
        differences[name] = min(map(difference, bases, ask_replicas(client, name, replicas)))
        states = scheduler_reports(client)
        _check_adapter(plan, name, differences[name], noise, _adapter_tokens(states) - before)
        for state in computing_of(states):
            _check_reference(state)
    names = check_names(plan, client, PROMPT, max(SMALLEST_DIFFERENCE, NOISE_FACTOR * noise), NOISE_FACTOR)
    return _summary(len(replicas), states, noise, differences, names)


def ask_replicas(client: httpx.Client, adapter: str | None, replicas: range) -> list[dict[int, float]]:
    """The first-token logprobs from each data-parallel replica; one without server.dp."""
    named: list[dict[str, Any]] = [{"routed_dp_rank": rank} for rank in replicas] if len(replicas) > 1 else [{}]
    return [first_token_logprobs(client, adapter, **replica) for replica in named]


def first_token_logprobs(client: httpx.Client, adapter: str | None, **options: Any) -> dict[int, float]:
    """Token id → logprob of the most probable first tokens after PROMPT, computed without a cached prefix."""
    options |= {"return_logprob": True, "top_logprobs_num": TOP_LOGPROBS}
    answer = generate(client, text=PROMPT, lora_path=adapter, **options)
    return {token: logprob for logprob, token, _ in answer["meta_info"]["output_top_logprobs"][0]}


def scheduler_reports(client: httpx.Client) -> list[Report]:
    """The report of each scheduler process: all ranks of all replicas. Raises ProofFailed if one is missing."""
    return [report for own in replica_reports(client) for report in (own, *own["others"])]


def replica_reports(client: httpx.Client) -> list[Report]:
    """The report of `kt_sglang.proof` from rank 0 of each replica. Raises ProofFailed if one is missing."""
    states = client.get("/server_info").json()["internal_states"]
    reports = [state.get(REPORT) for state in states]
    if not reports or None in reports:
        raise ProofFailed(
            "proof",
            f"{reports.count(None) or 'all'} of {len(reports)} scheduler processes run without kt_sglang's plugin",
            "look for 'plugin' in the server's log, and run kt-launch doctor",
        )
    return reports


def _check_processes(plan: LaunchPlan, reports: list[Report]) -> None:
    """As many as planned, each on its own CPUs. The CPUs of other hosts' processes are not known here."""
    if "server.processes" not in plan.resolved or "server.nodes" in plan.resolved:
        return
    wanted, found = plan.value("server.processes"), [show_cpu_list(each["cpus"]) for each in reports]
    if sorted(wanted) != sorted(found):
        problem = f"scheduler processes run on CPUs {' and '.join(found)}, expected {' and '.join(wanted)}"
        raise ProofFailed("server.processes", problem, "report this with the run folder")


def _check_computing(plan: LaunchPlan, reports: list[Report]) -> None:
    """Every process computes CPU experts, or with kt.tp_experts=rank0 the first of those that split a copy."""
    first = TP_EXPERTS_KEY in plan.resolved and plan.value(TP_EXPERTS_KEY) == RANK0
    wanted = len(reports) // plan.value("server.tp") if first else len(reports)
    found = len(computing_of(reports))
    if found != wanted:
        problem = f"{found} of {len(reports)} scheduler processes compute routed experts, expected {wanted}"
        raise ProofFailed(TP_EXPERTS_KEY, problem, "report this with the run folder")


def computing_of(reports: list[Report]) -> list[Report]:
    """The processes that compute CPU experts."""
    return [report for report in reports if not computes_nothing(report)]


def _check_layers(plan: LaunchPlan, report: Report) -> None:
    """A process without CPU experts has given zeros for each layer."""
    expected, nothing = plan.value("model.moe_layers"), computes_nothing(report)
    ran = [layer["layer"] for layer in report["layers"] if layer["passed" if nothing else "batches"] > 0]
    if report["missing_hooks"]:
        raise ProofFailed("proof", f"SGLang did not take {report['missing_hooks']}", "run kt-launch doctor")
    if len(ran) != expected:
        raise ProofFailed(
            "proof",
            f"{'zeros were given' if nothing else 'kt_kernels ran'} in {len(ran)} layers ({ran}), expected {expected}",
            "the experts of the other layers ran elsewhere; report this with the run folder",
        )


def _check_reference(report: Report) -> None:
    for layer in report["layers"]:
        limit = method_of(layer["method"]).reference_limit
        for slot, error in layer["reference_error"].items():
            if error is not None and not error <= limit:
                who = "the base" if slot == BASE_SLOT else f"the adapter in slot {slot}"
                raise ProofFailed(
                    "proof",
                    f"layer {layer['layer']}: one token of {who}, recomputed in float32, is off by {error:.2g} "
                    f"(relative L2), expected at most {limit:g}",
                    "the kernel computes something else on this machine: run kt-launch doctor, then report it",
                )


def _reference_errors(layers: list[LayerReport]) -> dict[str, float]:
    """Largest error of the base and of any adapter; a side that could not be recomputed is left out."""
    found: dict[str, float] = {}
    for layer in layers:
        for slot, error in layer["reference_error"].items():
            side = "base" if slot == BASE_SLOT else "adapter"
            if error is not None:
                found[side] = max(found.get(side, 0.0), error)
    return found


def _adapter_tokens(reports: list[Report]) -> int:
    return min((layer["adapter_tokens"] for report in computing_of(reports) for layer in report["layers"]), default=0)


def _check_adapter(plan: LaunchPlan, name: str, found: float, noise: float, tokens: int) -> None:
    smallest = max(SMALLEST_DIFFERENCE, NOISE_FACTOR * noise)
    if found <= smallest:
        raise ProofFailed(
            f"lora.{name}",
            f"base and adapter give the same first-token logprobs (largest difference {found:.2g}, expected more than "
            f"{smallest:.2g}; {tokens} adapter rows a layer went through kt_kernels)",
            "the adapter does nothing: its B matrices are zero, or it is not the trained one",
        )
    if tokens == 0 and plan.reaches_experts(name):
        raise ProofFailed(
            f"lora.{name}",
            "the adapter reaches routed experts, but none of its rows went through kt_kernels",
            "report this with the run folder",
        )


def _summary(replicas: int, reports: list[Report], noise: float, differences: dict[str, float], names: Names) -> Proof:
    layers, cache = reports[0]["layers"], reports[0].get("packed_cache", {})
    return Proof(
        layers=len(layers),
        experts_a_layer=layers[0]["experts"],
        isa=layers[0]["isa"],
        method=method_of(layers[0]["method"]).name,
        replicas=replicas,
        schedulers=len(reports),
        computing=len(computing_of(reports)),
        noise=noise,
        difference=differences,
        reference_error=_reference_errors(layers),
        mapped_layers=sum(layer.get("mapped", False) for layer in layers),
        packed_entry=cache.get("entry"),
        cache_problem=cache.get("problem"),
        names=names,
    )
