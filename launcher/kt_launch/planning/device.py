"""The device of everything but the routed experts, and SGLang's settings for it unless the user says otherwise."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from kt_launch.machine.host import Host
from kt_launch.planning.draft import Draft
from kt_model.errors import Problems


@dataclass(frozen=True)
class DeviceRules:
    """SGLang's settings on a device unless the user says otherwise; None leaves the choice to SGLang."""

    backends: Mapping[str, str | None]
    limits: Mapping[str, float | None]
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


DEVICES: Mapping[str, DeviceRules] = {
    "cpu": DeviceRules(
        backends={"attention_backend": "torch_native", "sampling_backend": "pytorch", "lora_backend": "torch_native"},
        limits={"context_length": 4096, "max_running_requests": 4, "mem_fraction": 0.8},
        arguments=("--sleep-on-idle",),
        # OpenMP's threads busy-wait, which would compete with the expert threads. Compiling small CPU operators takes
        # longer than it saves.
        env={"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    ),
    "cuda": DeviceRules(
        backends={"attention_backend": None, "sampling_backend": None, "lora_backend": "triton"},
        limits={"context_length": None, "max_running_requests": None, "mem_fraction": None},
        # A fused shared expert would be one of the routed experts: on the CPU, and out of an adapter's reach.
        arguments=("--disable-prefill-cuda-graph", "--disable-shared-experts-fusion"),
        # By default Inductor starts one process per core, each importing torch, for the few operators compiled here.
        env={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
    ),
}


def device_rules(draft: Draft) -> DeviceRules:
    """For the resolved device."""
    return DEVICES[draft.value("server.device")]


def resolve_device(draft: Draft) -> None:
    host, wanted = draft.facts.host, draft.config.server.device
    usable = bool(host.gpus) and host.cuda_torch
    if wanted == "auto":
        draft.set("server.device", "cuda" if usable else "cpu", f"probed: {_describe_gpus(host)}")
    else:
        draft.keep("server.device")
    if wanted == "cuda" and not usable:
        draft.problems.add("server.device", f"cuda, but {_describe_gpus(host)}", "Set server.device=cpu.")


def check_installed(host: Host, problems: Problems, device: str = "auto", action: str = "server") -> None:
    """Check that torch and SGLang are installed: plans are made without them, and quantizing needs only torch."""
    from kt_model.installed import install_command, missing_packages

    missing = [name for name in missing_packages() if action == "server" or name == "torch"]
    if missing:
        gpu = bool(host.gpus) and device != "cpu"
        machine = (
            f"which has {host.gpus[0].name}" if gpu else "which has no GPU" if not host.gpus else "without its GPU"
        )
        are = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in {sys.prefix}"
        problems.add(action, are, f"On this machine, {machine}, run: {install_command(gpu)}")


def _describe_gpus(host: Host) -> str:
    if not host.gpus:
        return "no GPU"
    if not host.cuda_torch:
        return f"{host.gpus[0].name}, but the installed torch is a CPU build"
    return ", ".join(gpu.name for gpu in host.gpus)
