"""Collects mistakes of an adapter: each kind is reported once, with the first names that have it."""

from __future__ import annotations

from kt_model.errors import Problems, shown

SAME_MODULE = "keys that mean the same module"


class Mistakes:
    """Kind -> names."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, kind: str, name: str, fix: str = "Save the adapter again.") -> None:
        """Add one more name of a kind; {count} in the kind becomes the number of names."""
        self._found.setdefault((kind, fix), []).append(name)

    def __bool__(self) -> bool:
        return bool(self._found)

    def tell(self, where: str, problems: Problems) -> None:
        """One problem per kind."""
        for (kind, fix), names in self._found.items():
            problems.add(where, f"{kind.replace('{count}', str(len(names)))}: {shown(names)}", fix)
