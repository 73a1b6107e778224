"""The number formats of routed experts on the CPU: one row each, with all its facts.

The kernels compute each of them with whatever the CPU has: AMX, AVX-512 or AVX2. The longer names (AMXINT8_SFT) come
from kt-kernel and SGLang and do not mean that AMX is needed; they are accepted as aliases, and used in `--kt-method`
and in files on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One number format."""

    name: str
    """As users type it."""
    sglang_name: str
    """The name in SGLang's --kt-method, in kt_kernels and in folders on disk."""
    bits: int
    """Bits of one stored weight, without its share of a scale."""
    scale_bytes: int
    """Bits of one scale; 0 if weights are stored unscaled."""
    group: int | None
    """Inputs that share a scale; None: a whole row."""
    reference_limit: float
    """Largest relative L2 error of one token's layer output compared with float32: about three times what rounding to
    this format gives on real weights."""
    doctor_limit: float
    """The same for all tokens of the doctor's small random layer. bfloat16 rounds by at most 2**-9 of a value, and an
    output there accumulates three roundings; int8 and int4 round correspondingly more coarsely. A wrong kernel is off
    by about 1."""

    @property
    def quantized(self) -> bool:
        """Whether the weights come from a folder that kt-launch quantize makes."""
        return self.scale_bytes > 0


BF16 = Method("bf16", "AMXBF16_SFT", 16, 0, None, reference_limit=0.02, doctor_limit=4 * 2**-9)
INT8 = Method("int8", "AMXINT8_SFT", 8, 4, None, reference_limit=0.08, doctor_limit=0.04)
INT4 = Method("int4", "AMXINT4_SFT", 4, 2, 32, reference_limit=0.35, doctor_limit=0.2)

METHODS: Mapping[str, Method] = {method.name: method for method in (BF16, INT8, INT4)}
"""By short name, the largest format first."""
QUANTIZED = tuple(name for name, method in METHODS.items() if method.quantized)
_BY_ANY_NAME = dict(METHODS) | {method.sglang_name.lower(): method for method in METHODS.values()}


def method_of(name: str) -> Method:
    """The method of either name, in upper or lower case. Raises KeyError."""
    return _BY_ANY_NAME[name.lower()]


def short_name(name: object) -> object:
    """The short name of a method; anything else unchanged."""
    found = _BY_ANY_NAME.get(name.lower()) if isinstance(name, str) else None
    return found.name if found else name
