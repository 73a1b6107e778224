"""Whether the compiled kernels fit this CPU and compute correct results on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kt_launch.doctor import Finding
from kt_launch.doctor.environment import AS_FOR_TORCH
from kt_launch.doctor.machine import AMX_FIX
from kt_launch.machine.host import INSTRUCTION_SETS, Host, read_host
from kt_model.installed import missing_packages
from kt_model.methods import METHODS, method_of

if TYPE_CHECKING:
    import torch

REBUILD = "Build the wheel on this machine, with GCC 12 or Clang 17, or newer."
EXPERTS, HIDDEN, INNER, TOKENS, TOP_K, RANK = 4, 96, 80, 5, 2, 3


def check_instruction_sets() -> Finding:
    import kt_kernels

    return compare_instruction_sets(read_host(), kt_kernels.compiled_isas(), kt_kernels.isas())


def compare_instruction_sets(host: Host, built: list[str], usable: list[str]) -> Finding:
    """Compares the CPU's features with what the wheel contains and the system permits."""
    if not usable:
        problem = f"none of {', '.join(built) or 'no kernels'} runs on {host.cpu_model}"
        return Finding("fail", problem, REBUILD)
    left = [isa for isa, flags in INSTRUCTION_SETS.items() if flags and flags <= host.cpu_flags and isa not in usable]
    if not left:
        return Finding("pass", f"{usable[0]} of {', '.join(usable)}, on {host.cpu_model}")
    if left[0] not in built:
        return Finding(
            "warn", f"the CPU has {left[0]}, but the wheel has no kernels for it; {usable[0]} is used", REBUILD
        )
    fix = AMX_FIX if left[0] == "amx" else f"Ask the administrator why the kernel does not permit {left[0]}."
    return Finding("warn", f"the CPU has {left[0]}, but the system does not permit it; {usable[0]} is used", fix)


def check_forward() -> Finding:
    """One forward of each method on each usable instruction set, with an adapter, compared with float64."""
    if "torch" in missing_packages():
        return Finding("fail", "not checked: torch is not installed", AS_FOR_TORCH)
    import kt_kernels

    errors = {(method, isa): forward_error(method, isa) for method in METHODS for isa in kt_kernels.isas()}
    limits = {name: method.doctor_limit for name, method in METHODS.items()}
    wrong = [f"{method} on {isa}" for (method, isa), error in errors.items() if not error <= limits[method]]
    worst = {method: max(error for (name, _), error in errors.items() if name == method) for method in METHODS}
    shown = ", ".join(f"{method} {error:.1e}" for method, error in worst.items())
    if wrong:
        expected = ", ".join(f"{method} {limit:.1e}" for method, limit in limits.items())
        fix = f"Do not serve with {', '.join(wrong)} here; report this with the output of kt-launch doctor."
        return Finding("fail", f"largest relative error {shown}; at most {expected} is expected", fix)
    return Finding("pass", f"largest relative error on {', '.join(kt_kernels.isas())}: {shown}")


def forward_error(method: str, isa: str) -> float:
    """Relative L2 difference from float64, over the whole result."""
    import torch

    import kt_kernels

    made = torch.Generator().manual_seed(7)
    weights = [
        _random(made, *shape)
        for shape in ((EXPERTS, INNER, HIDDEN), (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    ]
    pairs = [
        (_random(made, EXPERTS, RANK, weight.shape[2]), _random(made, EXPERTS, weight.shape[1], RANK))
        for weight in weights
    ]
    x = _random(made, TOKENS, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS, generator=made)[:TOP_K] for _ in range(TOKENS)])
    shares = torch.rand(TOKENS, TOP_K, generator=made)
    slots = torch.tensor([0, -1] * TOKENS)[:TOKENS]
    moe = kt_kernels.MoE(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        method=method_of(method).sglang_name,
        isa=isa,
        pool=kt_kernels.ThreadPool(2),
    )
    for expert in range(EXPERTS):
        moe.load_expert(expert, *(weight[expert].contiguous() for weight in weights))
    moe.set_adapter(0, kt_kernels.Adapter(*(side for pair in pairs for side in pair), scale=0.5))
    out = torch.empty(TOKENS, HIDDEN)
    moe.forward(x, ids, shares, slots, out)
    expected = _reference(x, ids, shares, slots, weights, pairs, scale=0.5)
    return float((out.double() - expected).norm() / expected.norm())


def _random(made: torch.Generator, *shape: int) -> torch.Tensor:
    import torch

    scaled: torch.Tensor = torch.randn(*shape, generator=made) / shape[-1] ** 0.5
    return scaled.to(torch.bfloat16)


def _reference(x: Any, ids: Any, shares: Any, slots: Any, weights: Any, pairs: Any, scale: float) -> Any:
    """The definition of an MoE layer, pair by pair, in float64."""
    import torch

    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for chosen, share in zip(ids[token].tolist(), shares[token].tolist(), strict=True):
            gate, up, down = (
                _adapted(w, p, chosen, slots[token] >= 0, scale) for w, p in zip(weights, pairs, strict=True)
            )
            row = x[token].double()
            out[token] += share * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    return out


def _adapted(weight: Any, pair: Any, expert: int, adapted: Any, scale: float) -> Any:
    matrix = weight[expert].double()
    return matrix + scale * pair[1][expert].double() @ pair[0][expert].double() if adapted else matrix
