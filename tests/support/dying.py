"""Moments at which a process ends by SIGKILL: just before it imports, reads, writes, removes or renames something.

A first, undisturbed run counts them; then one of them is chosen. The process does it to itself, since nobody from
outside is quick enough to meet a rename (dying/sitecustomize.py).
"""

from __future__ import annotations

import functools
import json
import operator
import os
from collections import Counter
from pathlib import Path
from random import Random

IMPORTS, READING, WRITING, RENAMING = "imports", "reading", "writing", "renaming"
HOOK = Path(__file__).with_name("dying")


def counting(log: Path, below: Path) -> dict[str, str]:
    """The environment of a process that writes down its moments; below: files elsewhere do not count."""
    return _environment({"below": str(below), "log": str(log)})


def counted(log: Path) -> Counter[str]:
    """Kind -> how many there were in the process that had most of them."""
    found: dict[str, Counter[str]] = {}
    for line in log.read_text().splitlines():
        process, kind = line.split()
        found.setdefault(process, Counter())[kind] += 1
    return functools.reduce(operator.or_, found.values(), Counter())


def dying_at(kind: str, number: int, below: Path, armed: Path) -> dict[str, str]:
    """The environment of a process that dies at the number-th moment of a kind: it, or the first of its children that
    comes so far, while the file `armed` is there, which goes with it."""
    armed.touch()
    return _environment({"below": str(below), "kind": kind, "number": number, "armed": str(armed)})


def any_of(count: int, rng: Random) -> int:
    """One of so many, the first and the last more often: what begins and what ends matters most."""
    return rng.choice((1, count, rng.randint(1, count), rng.randint(1, count)))


def _environment(asked: dict[str, object]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH", "")]))
    return {"KT_CHAOS_DYING": json.dumps(asked), "PYTHONPATH": path}
