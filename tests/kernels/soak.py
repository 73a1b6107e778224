"""A million forwards with adapters coming and going: memory must not grow, results must stay the same.

python tests/kernels/soak.py [FORWARDS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from reference import METHODS, build, forward, random_batch, random_layer, random_lora

# The smallest allocation, 16 bytes, lost with each forward of a method would be 5 MiB. Not less: the system may make
# one huge page of 2 MiB, at any time, out of scratch of which little is in use.
MOST_GROWTH_KIB = 4096


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * (os.sysconf("SC_PAGE_SIZE") // 1024)


def soak(method: str, forwards: int) -> int:
    """KiB that the process grew; exits when a result differs from the first one."""
    layer = random_layer(4, 64, 64)
    layer.adapters = {slot: random_lora(layer, 4 + slot, seed=slot) for slot in range(2)}
    moe = build(layer, "auto", method)
    batches = [random_batch(layer, tokens, 2, slots=(-1, 0, 1)) for tokens in (1, 3, 20)]
    expected = [forward(moe, batch) for batch in batches]
    outs = [torch.empty_like(out) for out in expected]

    def rounds(count: int) -> None:
        for turn in range(count):
            batch, out = batches[turn % 3], outs[turn % 3]
            moe.forward(batch.x, batch.ids, batch.weights, batch.slots, out)
            if turn % 100 == 0:
                moe.set_adapter(turn // 100 % 2, layer.adapters[turn // 100 % 2].packed())

    rounds(5000)
    first = resident_kib()
    rounds(forwards)
    grown = resident_kib() - first
    for out, before in zip(outs, expected, strict=True):
        if not torch.equal(out, before):
            sys.exit(f"soak: {method}: the last result differs from the first")
    return grown


def main() -> None:
    forwards = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    failed = False
    for method in METHODS:
        grown = soak(method, forwards // len(METHODS))
        failed |= grown > MOST_GROWTH_KIB
        print(f"{method}: {forwards // len(METHODS)} forwards, memory grew by {grown} KiB (at most {MOST_GROWTH_KIB})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
