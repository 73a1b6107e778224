"""Checks that the loader has written every weight of the served model: all are set to NaN before loading, and the start
fails naming those that are NaN afterwards. SGLang skips names that it does not know, and would serve uninitialized
memory.

Not here: CPU experts, which never become SGLang's parameters; weights.py counts them as they arrive.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError, shown
from kt_sglang.moe.served_checkpoint import served_checkpoint

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""SGLang's fused modules and the checkpoint tensors they consist of."""
CHECKERS = 3
"""Threads that check an expert's three matrices."""
_blank: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def after_initialize_model(model: torch.nn.Module, model_config: Any, *_: Any, **__: Any) -> torch.nn.Module:
    """AFTER hook of `loader._initialize_model`: sets all weights to NaN. Draft models borrow weights from the served
    one."""
    if not model_config.is_draft_model:
        with torch.no_grad():
            for _name, parameter in _floating(model):
                parameter.fill_(math.nan)
        _blank.add(model)
    return model


def around_load_weights_only(
    original: Callable[..., None], model: torch.nn.Module, *arguments: Any, **options: Any
) -> None:
    """AROUND hook of `DefaultModelLoader.load_weights_only`: checks all weights after loading. Raises LaunchError."""
    original(model, *arguments, **options)
    if model in _blank:
        require_written(model, served_checkpoint())


def require_written(model: torch.nn.Module, base: Checkpoint) -> None:
    """Raise LaunchError naming the weights that hold NaN or infinity: stored so, or never written."""
    wrong = [name for name, parameter in _floating(model) if not is_finite(parameter)]
    if not wrong:
        return
    stored = {name for each in wrong for name in _parts(each) if name in base.located}
    broken = sorted(name for name in stored if not is_finite(_read(base, name)))
    if broken:
        problem = f"{base.path} is broken: NaN or infinity in {_count(broken)}: {shown(broken)}"
        raise LaunchError("model.path", problem, "Download these files again.")
    unwritten = [part for name in wrong for part in _unwritten(name, base)]
    problem = f"{base.path} provides no values for {_count(unwritten)} of the model: {shown(unwritten)}"
    raise LaunchError("model.path", problem, "Download the whole checkpoint again, with its own config.json.")


def _floating(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters whose values torch can compare, unlike those of 8 bits and less."""
    found = ((name, each) for name, each in model.named_parameters() if each.is_floating_point() and each.numel())
    return ((name, each) for name, each in found if each.dtype.itemsize > 1)


def is_finite(values: torch.Tensor) -> bool:
    """Neither NaN nor infinity; one pass at memory speed, where isnan takes twenty times as long."""
    least, most = torch.aminmax(values.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _parts(name: str) -> list[str]:
    """The stored tensors that a parameter of SGLang consists of."""
    for fused, members in FUSED.items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{member}.") for member in members]
    return [name]


def _unwritten(name: str, base: Checkpoint) -> list[str]:
    """The parts that are not stored; the parameter itself if all are, and SGLang skipped one."""
    return [part for part in _parts(name) if part not in base.located] or [name]


def _read(base: Checkpoint, name: str) -> torch.Tensor:
    from safetensors import safe_open

    found = base.located[name]
    with safe_open(found.file.path, framework="pt", device="cpu") as tensors:
        return found.cut(tensors.get_tensor(found.stored))


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


@cache
def _checkers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CHECKERS, "finite")


def finite_meanwhile(tensors: list[torch.Tensor]) -> Callable[[], bool]:
    """Start checking tensors in the background; calling the result waits for the answer."""
    found = [_checkers().submit(is_finite, each) for each in tensors]
    return lambda: all(each.result() for each in found)
