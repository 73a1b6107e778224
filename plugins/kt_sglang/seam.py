"""Definition of a seam into SGLang; hooks.py, edge/ and without_gpu/ have the rows."""

from __future__ import annotations

from typing import NamedTuple


class Seam(NamedTuple):
    """One place of SGLang that we replace or wrap.

    target: dotted path inside SGLang. hook: module:attribute of ours. kind: HookType name. reason: why it is needed.
    """

    target: str
    hook: str
    kind: str
    reason: str
