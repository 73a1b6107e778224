"""The number formats of routed experts on the CPU: one row each, with every fact about it.

The kernels compute each of them with whatever the CPU has: AMX, AVX-512 or AVX2. The longer names (AMXINT8_SFT) are
kt-kernel's and SGLang's, and do not mean that AMX is needed; they are accepted as aliases, and are what `--kt-method`
and the files on disk say.
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
    """As SGLang's --kt-method, kt_kernels and the folders on disk have it."""
    bits: int
    """Of one stored weight, without its share of a scale."""
    weights_key: str
    """The config key of the folder that the weights are read from."""
    scale_bytes: int
    """Of one scale; 0 where weights are stored as they are."""
    group: int | None
    """Inputs that share a scale; None: all of a row."""
    reference_limit: float
    """Largest relative L2 error of one token's layer output against float32: about three times what rounding to this
    format gives on real weights."""
    doctor_limit: float
    """The same for the doctor's small random layer, of all its tokens. bfloat16 rounds by at most 2**-9 of a value, and
    an output there is a sum over three roundings; int8 and int4 round that much more coarsely. A kernel that computes
    something else is off by about 1."""

    @property
    def quantized(self) -> bool:
        """Whether the weights come from a folder that action=quantize makes."""
        return self.scale_bytes > 0


BF16 = Method("bf16", "AMXBF16_SFT", 16, "model.path", 0, None, reference_limit=0.02, doctor_limit=4 * 2**-9)
INT8 = Method("int8", "AMXINT8_SFT", 8, "kt.weight_path", 4, None, reference_limit=0.08, doctor_limit=0.04)
INT4 = Method("int4", "AMXINT4_SFT", 4, "kt.weight_path", 2, 32, reference_limit=0.35, doctor_limit=0.2)

METHODS: Mapping[str, Method] = {method.name: method for method in (BF16, INT8, INT4)}
"""By short name, the largest first."""
QUANTIZED = tuple(name for name, method in METHODS.items() if method.quantized)
_BY_ANY_NAME = dict(METHODS) | {method.sglang_name.lower(): method for method in METHODS.values()}


def method_of(name: str) -> Method:
    """The method of either name, in upper or lower case. Raises KeyError."""
    return _BY_ANY_NAME[name.lower()]


def short_name(name: object) -> object:
    """The short name of a method; anything else as it is."""
    found = _BY_ANY_NAME.get(name.lower()) if isinstance(name, str) else None
    return found.name if found else name
