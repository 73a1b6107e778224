"""Files as no tool writes them: JSON and YAML in which values are of another type, absurd or gone, and broken bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

TERMINAL = "\x1b[2J\x1b]0;owned\x07\u202ereversed\u2066\r\nerror: forged\x00\x9b31m\u2028"
"""What moves a terminal's cursor, sets its title, turns text around and begins a line of its own."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        10**9,
        -(10**9),
        10**18,
        10**400,
        1e308,
        -0.5,
        0.1,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "0", "1e9", "auto", "..", "/", "../../etc/passwd", "/dev/zero", TERMINAL, "a" * 5000, "\ud800", "${a}"),
    *("model.safetensors", "NaN", "null", "(a+)+$", "x" * 40 + "!"),
    *([], {}, [[]], [None], [1, 2], ["x", 3], {"": ""}, {"x": None}, {"1": 1}, {TERMINAL: TERMINAL}, [10**9] * 3),
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a document."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def mutate(content: Any, rng: Random) -> Any:
    """A document of which one to three values are others, gone, doubled or deeply nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, last = rng.choice(list(places(content))[1:] or [("",)])
        if last == "" or not isinstance(content, dict | list):
            return rng.choice(VALUES)
        holder = content
        for key in way:
            holder = holder[key]
        kind = rng.randrange(12)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", TERMINAL, "../x", "0"))] = holder.pop(last)
        elif kind == 2:
            holder[last] = nested(rng.choice((3, 900, 20_000)), rng.choice((list, dict)))
        elif kind == 3:
            holder[last] = [holder[last], holder[last]]
        else:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
    return rng.choice(VALUES) if rng.random() < 0.03 else content


class Nested:
    """A value inside so many brackets; json.dumps cannot write one that deep, so that it is put in as text."""

    def __init__(self, depth: int, kind: type) -> None:
        self.text = "[" * depth + "]" * depth if kind is list else '{"a":' * depth + "1" + "}" * depth


def nested(depth: int, kind: type) -> Nested:
    return Nested(depth, kind)


def as_json(content: Any) -> bytes:
    """Its text, with what is deeply nested."""
    deep: list[str] = []

    def put_in(one: Any) -> str:
        deep.append(one.text)
        return f"DEEP{len(deep) - 1}."

    text = json.dumps(content, default=put_in)
    for number, found in enumerate(deep):
        text = text.replace(f'"DEEP{number}."', found)
    return text.encode("utf-8", "surrogatepass")


def damage(content: bytes, rng: Random) -> bytes:
    """Some bytes changed, taken away, doubled or inserted."""
    found = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place, length, kind = rng.randrange(len(found) + 1), rng.randrange(1, 64), rng.randrange(4)
        if kind == 0:
            found[place : place + 1] = rng.randbytes(1)
        elif kind == 1:
            del found[place : place + length]
        elif kind == 2:
            found[place:place] = found[place : place + length]
        else:
            found[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n".encode()
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
"""A billion values."""
DOCUMENTS: tuple[bytes, ...] = (
    BOMB,
    b"kt: &a {cpuinfer: 1, x: *a}\n",
    b"server: &s\n  extra_args: [*s]\n",
    b"&a [*a]\n",
    b"\x00\x01\x02\xff\xfe",
    b"\xff\xfe" + "kt: {}".encode("utf-16-le"),
    b"kt: !!binary aGVsbG8=\n",
    b"kt: !!python/object/apply:os.system [true]\n",
    b"kt:\n  cpuinfer: !!binary aGVsbG8=\n",
    b"? [1, 2]\n: x\n",
    b"? {a: b}\n: x\n",
    b"1: 2\n3.5: 4\ntrue: 5\nnull: 6\n",
    b"2020-01-01: 2020-01-01\n",
    b"[" * 5000,
    b"{a: " * 5000,
    b"- " * 5000,
    b"just a text",
    b"- a\n- b\n",
    b"3",
    b"--- {}\n--- {}\n",
    b"kt: {<<: 3}\n",
    b"kt: {cpuinfer: 0o777, method: 1_000, weight_path: 1:2:3}\n",
    b"defaults: [model: nowhere]\n",
    b"defaults: 3\n",
    b"defaults: [3, null, [x]]\n",
    b"# @package 3\nkt: {}\n",
    b"# @package ..x\nkt: {}\n",
    b"kt: ${kt}\n",
    b"kt: {cpuinfer: '${kt.cpuinfer}'}\n",
    b"kt: {cpuinfer: '${oc.env:HOME}'}\n",
    b"kt: {cpuinfer: '${oc.decode:}'}\n",
    b"kt: {weight_path: '${'}\n",
    b"hydra: 3\n",
    b"hydra: {run: 3}\n",
)
"""YAML that is no preset."""
