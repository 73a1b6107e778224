"""`python -P -m kt_launch.doctor.seams`: loads the plugin into the installed SGLang and says what does not fit.

By signature, not by version: a class of ours must take whatever SGLang hands to the class it stands for.
Prints one line of JSON.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def main() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from kt_sglang.hooks import active_seams

    seams = active_seams()
    mistakes = []
    for seam in seams:
        mistakes += list(_signature_mistakes(seam.target, seam.hook, seam.kind))
    print(json.dumps({"seams": len(seams), "mistakes": mistakes or _hooks_not_taken()}))


def _hooks_not_taken() -> list[str]:
    import kt_sglang
    from kt_sglang.hooks import missing_hooks

    kt_sglang.activate()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return [f"SGLang did not take the hook on {target}" for target in missing_hooks()]


def _signature_mistakes(target: str, hook: str, kind: str) -> Iterator[str]:
    try:
        original = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as failure:
        yield f"{target} is gone ({failure})"
        return
    if kind == "REPLACE":
        yield from class_mistakes(target, original, pkgutil.resolve_name(hook))


def class_mistakes(target: str, original: type, ours: type) -> Iterator[str]:
    """Methods of ours that do not take what SGLang's method of the same name takes."""
    for name, method in vars(ours).items():
        theirs = vars(original).get(name)
        if inspect.isfunction(method) and inspect.isfunction(theirs) and not accepts(method, theirs):
            yield f"{target}.{name} takes {inspect.signature(theirs)}, expected {inspect.signature(method)}"


def accepts(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Whether a call with all parameters of `theirs`, by position or by name, would reach `ours`."""
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values())
    named = [
        name
        for name, parameter in other.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if not open_ended and any(name not in mine for name in named):
        return False
    required = [
        name
        for name, parameter in mine.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return all(name in other for name in required)


if __name__ == "__main__":
    main()
