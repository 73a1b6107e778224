"""The machine's limits, measured by peaks.cpp (built at first use), and the ideal time that follows from them."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("peaks.cpp")
DRIFT_LIMIT = 0.05  # of before and after: more means that something else used the machine meanwhile


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings of `threads` threads together, in 1e9 a second; `rates` as peaks.cpp names them."""

    threads: int
    rates: dict[str, float]

    @property
    def read_gbs(self) -> float:
        return self.rates["read_gbs"]

    def gops(self, method: str, isa: str) -> float:
        """The fastest way that this instruction set has to multiply in this method's type."""
        names = _RATES["bf16" if "BF16" in method else "int8"]
        usable = [name for family in _FAMILIES.get(isa.partition("_")[0], _FAMILIES["amx"]) for name in names[family]]
        return max(self.rates.get(name, 0.0) for name in usable)

    def ideal_ms(self, bytes_read: float, operations: float, method: str, isa: str) -> float:
        return max(bytes_read / self.read_gbs, operations / self.gops(method, isa)) / 1e6

    def drift(self, other: "Peaks", method: str, isa: str) -> float:
        """How far the peaks of this arithmetic are apart. The read rate is not among them: it is measured in each
        round, and on a virtual machine it moves without anybody's doing."""
        one, two = self.gops(method, isa), other.gops(method, isa)
        return abs(one - two) / max(one, two)

    def best(self, other: "Peaks") -> "Peaks":
        return Peaks(self.threads, {name: max(rate, other.rates[name]) for name, rate in self.rates.items()})


# An instruction set may use those below it. "reference" and torch are held against the best that the CPU has.
_FAMILIES = {"amx": ["amx", "avx512", "avx2"], "avx512": ["avx512", "avx2"], "avx2": ["avx2"]}
_RATES = {
    # On some CPUs vdpbf16ps is slower than float32 multiply-adds, so either may be the ceiling.
    "bf16": {
        "amx": ["amx_bf16_gflops"],
        "avx512": ["avx512_bf16_gflops", "avx512_f32_gflops"],
        "avx2": ["avx2_f32_gflops"],
    },
    "int8": {"amx": ["amx_int8_gops"], "avx512": ["avx512_int8_gops"], "avx2": ["avx2_int8_gops", "avx2_f32_gflops"]},
}


def build() -> Path:
    """The compiled program, kept in the temporary folder under a name made of its source."""
    name = f"kt-peaks-{os.getuid()}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    program = Path(tempfile.gettempdir()) / name
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-O3", "-std=c++20", "-pthread", str(SOURCE), "-o", str(unfinished)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"benchmarks: cannot build peaks.cpp ({error}); it needs g++ 11 or newer (CXX=… names one).")
        unfinished.rename(program)
    return program


def measure(threads: int, *, megabytes: int = 1024, milliseconds: int = 20, repetitions: int = 4) -> Peaks:
    options = {"--threads": threads, "--mb": megabytes, "--ms": milliseconds, "--reps": repetitions}
    command = [str(build()), *(str(word) for option in options.items() for word in option)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rates = json.loads(printed)
    return Peaks(int(rates.pop("threads")), rates)


class ReadRate:
    """The machine's read rate now, asked for again and again: the memory of a virtual machine is shared with others,
    and a rate from a minute ago says little. A process of its own, idle between questions."""

    def __init__(self, threads: int, *, megabytes: int, milliseconds: int = 8) -> None:
        options = {"--threads": threads, "--mb": megabytes, "--ms": milliseconds, "--serve": 1}
        command = [str(build()), *(str(word) for option in options.items() for word in option)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def gbs(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
