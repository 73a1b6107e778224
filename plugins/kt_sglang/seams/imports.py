"""Resolves a dotted path inside SGLang, and says why that fails: because the object is gone, or because a module on the
path exists but cannot be imported, usually for lack of a package. The two have different fixes.
"""

from __future__ import annotations

import importlib
from typing import Any


def resolve(path: str) -> Any:
    """The module, class or function at a path. Raises AttributeError if it is gone, and the ImportError itself if
    importing a module on the path raised one (which pkgutil.resolve_name hides)."""
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
    """The error itself, as the last line of a traceback."""
    return f"{type(failure).__name__}: {failure}"
