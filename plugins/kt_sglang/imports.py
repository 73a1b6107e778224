"""What stands at a dotted path inside SGLang, and why nothing does: because it is gone, or because a module on the way
is there and cannot be imported, mostly for want of a package. The two have other cures.
"""

from __future__ import annotations

import importlib
from typing import Any


def resolve(path: str) -> Any:
    """The module, class or function at a path. Raises AttributeError where it is gone, and the ImportError itself where
    importing a module on the way raised one (which pkgutil.resolve_name keeps to itself)."""
    first, *names = path.split(".")
    found = importlib.import_module(first)
    module = first
    while names:
        try:
            found = importlib.import_module(f"{module}.{names[0]}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{module}.{names[0]}":
                raise
            break
        module = f"{module}.{names.pop(0)}"
    for name in names:
        found = getattr(found, name)
    return found


def describe(failure: ImportError) -> str:
    """The error itself, as a traceback ends with it."""
    return f"{type(failure).__name__}: {failure}"
