"""Definition of a seam into SGLang; hooks.py, edge/ and without_gpu/ have the rows."""

from __future__ import annotations

from typing import NamedTuple


class Seam(NamedTuple):
    """One place of SGLang that we replace or wrap.

    target: dotted path inside SGLang. hook: module:attribute of ours. reason: why it is needed.
    """

    target: str
    hook: str
    reason: str

    @property
    def kind(self) -> str:
        """SGLang's HookType, by the name of our hook: around_, after_ or before_; a class replaces SGLang's."""
        how = self.hook.partition(":")[2].partition("_")[0].upper()
        return how if how in ("AROUND", "AFTER", "BEFORE") else "REPLACE"
