"""Makes hooks reach modules that imported a function by name: one scan of all modules instead of one scan per hook."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

from sglang.srt.plugins import hook_registry


def install() -> None:
    """Replace SGLang's scans by one; `register_hooks` calls this before SGLang applies the registered hooks.

    Trigger: SGLang 0.5.23 scans every name of every module for each hook (`_propagate_patch`): with about fifty of our
    hooks, two million names and a second and a half of each start. Safe because the same names get the same values:
    the index of bindings is kept only while hooks are applied, checked again before anything is set, and rebuilt when a
    module was imported in between; and `require_hooks` checks the result. An SGLang without that function, or without
    `apply_hooks`, is left unchanged. Remove when SGLang itself scans once.
    """
    registry = hook_registry.HookRegistry
    own = getattr(registry, "apply_hooks", None)
    if own is None or not hasattr(hook_registry, "_propagate_patch"):
        return

    def apply_hooks() -> None:
        theirs, hook_registry._propagate_patch = hook_registry._propagate_patch, Bindings().replace
        try:
            own()
        finally:
            hook_registry._propagate_patch = theirs

    registry.apply_hooks = staticmethod(apply_hooks)


class Bindings:
    """Which names of which modules are bound to a value, as of one look."""

    def __init__(self) -> None:
        self._modules: list[int] = []
        self._names: dict[int, list[tuple[ModuleType, str]]] = {}

    def replace(self, original: object, wrapped: object, source: object) -> int:
        """Bind to `wrapped` what is bound to `original` in modules other than `source`; how many names there were."""
        self._look_again_after_imports()
        places = self._names.pop(id(original), [])
        self._names.setdefault(id(wrapped), []).extend(places)
        others = [(module, name) for module, name in places if module is not source]
        return sum(_bind(module, name, original, wrapped) for module, name in others)

    def _look_again_after_imports(self) -> None:
        modules = list(sys.modules.values())
        if self._modules == list(map(id, modules)):
            return
        self._modules, self._names = list(map(id, modules)), defaultdict(list)
        for module in modules:
            if isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    self._names[id(value)].append((module, name))


def _bind(module: ModuleType, name: str, original: object, wrapped: Any) -> bool:
    if vars(module).get(name) is not original:
        return False
    try:
        setattr(module, name, wrapped)
    except (AttributeError, TypeError):
        return False
    return True
