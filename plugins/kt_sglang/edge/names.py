"""What a name in a request means: the base model, or one adapter. Pure.

Not here: where a request carries names (requests.py), which adapters there are (adapters.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True)
class Meaning:
    """The model or adapter that answers. id: as in /v1/models; adapter: SGLang's name for it, None for the base."""

    id: str
    adapter: str | None


class UnknownName(Exception):
    """Nothing is served under this name."""

    def __init__(self, typed: str, nearest: str) -> None:
        super().__init__(typed)
        self.typed, self.nearest = typed, nearest


@dataclass(frozen=True)
class Names:
    """The names of one server. An adapter's id is <base>:<adapter>; its name alone means the same.

    On a conflict the base comes first, then ids, then adapters' own names: an adapter named like the base is reached by
    its id, and a listed id always means what it says.
    """

    base: str
    adapters: Collection[str]

    @property
    def listed(self) -> list[Meaning]:
        """The ids in /v1/models: the base, then the adapters in the order of loading."""
        return [Meaning(self.base, None), *(self._of(adapter) for adapter in self.adapters)]

    def meaning(self, typed: str) -> Meaning:
        """Raises UnknownName."""
        if typed == self.base:
            return Meaning(self.base, None)
        head, behind_base = f"{self.base}:", typed.removeprefix(f"{self.base}:")
        if typed.startswith(head) and behind_base in self.adapters:
            return self._of(behind_base)
        if typed in self.adapters:
            return self._of(typed)
        raise UnknownName(typed, self.nearest(typed))

    def nearest(self, typed: str) -> str:
        """The id with the most similar spelling, by itself or by the adapter's name; there always is one."""
        spellings = {name: each.id for each in self.listed for name in (each.adapter or each.id, each.id)}
        return spellings[max(spellings, key=lambda name: _likeness(typed, name))]

    def _of(self, adapter: str) -> Meaning:
        return Meaning(f"{self.base}:{adapter}", adapter)


def _likeness(typed: str, name: str) -> float:
    return SequenceMatcher(None, typed.casefold(), name.casefold()).ratio()
