"""kt-kernel as a contender: it runs in a process of its own (peer_child.py), which is stopped whenever it is not its
turn, because its threads wait busily and it prints to stdout."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cases import AdapterCase, Batch, Shape

CHILD = Path(__file__).with_name("peer_child.py")
TAG = sys.implementation.cache_tag  # such as cpython-312
WAKE_S = 0.003  # from SIGCONT until its threads run again


class PeerFailed(Exception):
    """The child ended or answered with an error."""


def variant_of(folder: Path) -> str:
    """The extension in the folder that suits this CPU best."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    wanted = ["amx"] if {"amx_tile", "amx_int8", "amx_bf16"} <= flags else []
    for variant in [*wanted, "avx512_bf16", "avx512_vnni", "avx512_base", "avx2"]:
        if list(folder.glob(f"kt_kernel/_kt_kernel_ext_{variant}.{TAG}*.so")):
            return variant
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise PeerFailed(f"--kt-kernel: no kt_kernel/_kt_kernel_ext_*.so for this CPU and Python {version} in {folder}")


class Peer:
    """Better of N and N-1 threads is the caller's to find: each is a Peer."""

    settle_s = 0.0
    supports = staticmethod(lambda adapters: adapters.count <= 1 and not adapters.idle)

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        method: str,
        adapters: AdapterCase,
        threads: int,
        layers: int,
        most_tokens: int,
        distinct: int,
    ) -> None:
        self.method, self.threads, self.layers = method, threads, layers
        self.isa = variant_of(folder)
        self.impl = f"kt-kernel@{threads}"
        bits = {"AMXBF16_SFT": 16, "AMXINT8_SFT": 8, "AMXINT4_SFT": 4}[method]
        self.expert_bytes = shape.expert_weights * bits / 8
        task = {
            "folder": str(folder.resolve()),
            "variant": self.isa,
            "shape": vars(shape),
            "method": method,
            "adapters": adapters.name,
            "threads": threads,
            "layers": layers,
            "most_tokens": most_tokens,
            "distinct": distinct,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.load_s = self._read()["load_s"]
        self._child.send_signal(signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise PeerFailed(f"{self.impl} {self.method}: ended with {self._child.wait()}; {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.impl} {self.method}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split()[-30:])

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.send_signal(signal.SIGCONT)
        time.sleep(WAKE_S)
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            return self._read()
        except BrokenPipeError:
            raise PeerFailed(f"{self.impl} {self.method}: ended; {self._last_words()}") from None
        finally:
            self._child.send_signal(signal.SIGSTOP)

    def seconds(self, batch: Batch, number: int) -> float:
        return float(self._ask(tokens=batch.tokens, number=number)["seconds"])

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        with tempfile.NamedTemporaryFile() as file:
            self._ask(tokens=batch.tokens, number=number, write=file.name)
            data = bytearray(Path(file.name).read_bytes())
        return torch.frombuffer(data, dtype=torch.bfloat16).view(batch.x.shape)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        self._log.close()
