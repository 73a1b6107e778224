"""The process that drives kt-kernel's compiled extension for peer.py, without its Python package. A JSON line a
question on stdin, one an answer on stdout; what the extension prints goes to stderr."""

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import ADAPTER_SCALE, Batch, Shape, Weights, make_batches, make_lora, parse_adapters

PR_SET_PDEATHSIG = 1
CLASSES = {"AMXBF16_SFT": "AMXBF16", "AMXINT8_SFT": "AMXInt8", "AMXINT4_SFT": "AMXInt4"}


def load_extension(folder: Path, variant: str) -> Any:
    pattern = f"kt_kernel/_kt_kernel_ext_{variant}.{sys.implementation.cache_tag}*.so"
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", next(folder.glob(pattern)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Layers:
    """Equal layers, each packed by the extension, which reads raw addresses: everything is kept alive."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.shape = Shape(**task["shape"])
        self.adapters = parse_adapters(task["adapters"])
        self.method, self.most_tokens = task["method"], max(task["most_tokens"], 32)
        self.extension = load_extension(Path(task["folder"]), task["variant"])
        self.engine = self._start(task["threads"])
        self.weights = Weights(self.shape, task["distinct"]).stacked()
        self.loras = [make_lora(self.shape, rank, slot) for slot, rank in enumerate(self.adapters.ranks)]
        self.identity = torch.arange(self.shape.experts, dtype=torch.int64)
        self.load_s = 0.0
        self.moes = [self._layer(index) for index in range(task["layers"])]
        self._next = 0

    def _start(self, threads: int) -> Any:
        pools = self.extension.WorkerPoolConfig()
        pools.subpool_count = 1
        pools.subpool_numa_map = [0]
        pools.subpool_thread_count = [threads]
        return self.extension.CPUInfer(pools)

    def _layer(self, index: int) -> Any:
        kind = CLASSES[self.method]
        config = self._lora_config() if self.loras else self._base_config()
        config.max_len, config.layer_idx, config.pool = self.most_tokens, index, self.engine.backend_
        config.physical_to_logical_map = self.identity.data_ptr()
        moe = getattr(self.extension.moe, f"{kind}_SFT_MOE" if self.loras else f"{kind}_MOE")(config)
        start = time.perf_counter()
        task = moe.load_weights_task() if self.loras else moe.load_weights_task(self.identity.data_ptr())
        self.engine.submit(task)
        self.engine.sync()
        self.load_s = time.perf_counter() - start
        return moe

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.shape.experts, self.shape.top_k, self.shape.hidden, self.shape.intermediate

    def _base_config(self) -> Any:
        config = self.extension.moe.MOEConfig(*self._sizes(), 0)
        names = ("gate_proj", "up_proj", "down_proj")
        for name, stack in zip(names, self.weights, strict=True):
            if self.method == "AMXBF16_SFT":  # its native bf16 path takes a table of experts
                setattr(config, name + "s", [[matrix.data_ptr() for matrix in stack]])
            else:
                setattr(config, name, stack.data_ptr())
        return config

    def _lora_config(self) -> Any:
        config = self.extension.moe.MOESFTConfig(*self._sizes())
        rank = self.loras[0].rank
        config.lora_rank, config.lora_alpha, config.max_cache_depth = rank, ADAPTER_SCALE * rank, 1
        config.share_backward_bb = config.share_cache_pool = True  # as its SGLang fork sets them for serving
        for name, stack in zip(("gate_proj", "up_proj", "down_proj"), self.weights, strict=True):
            setattr(config, name, stack.data_ptr())
        names = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
        for name, factor in zip(names, self.loras[0].factors, strict=True):
            setattr(config, name, factor.data_ptr())
        return config

    def call(self, batch: Batch, out: torch.Tensor) -> float:
        moe = self.moes[self._next % len(self.moes)]
        self._next += 1
        count = torch.tensor([batch.tokens], dtype=torch.int32)
        tensors = (batch.ids, batch.weights, batch.x, out)
        arguments = (count.data_ptr(), self.shape.top_k, *(tensor.data_ptr() for tensor in tensors), False)
        task = moe.forward_sft_task(*arguments) if self.loras else moe.forward_task(*arguments)
        start = time.perf_counter()
        self.engine.submit(task)
        self.engine.sync()
        return time.perf_counter() - start


def answer(layers: Layers, batches: dict[int, list[Batch]], question: dict[str, Any]) -> dict[str, Any]:
    tokens = question["tokens"]
    if tokens not in batches:
        batches[tokens] = make_batches(layers.shape, tokens, layers.adapters)
    batch = batches[tokens][question["number"]]
    out = torch.empty_like(batch.x)
    seconds = layers.call(batch, out)
    if "write" in question:
        Path(question["write"]).write_bytes(out.view(torch.int16).numpy().tobytes())
    return {"seconds": seconds}


def end_with_parent() -> None:
    """Asks the kernel to, since a parent that is killed leaves this process stopped, with all its memory."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    torch.set_num_threads(1)
    try:
        layers = Layers(json.loads(sys.argv[1]))
        say({"load_s": layers.load_s})
        batches: dict[int, list[Batch]] = {}
        for line in sys.stdin:
            say(answer(layers, batches, json.loads(line)))
    except Exception as error:  # the parent reports it and goes on without kt-kernel
        say({"error": f"{type(error).__name__}: {error}"[:300]})
    os._exit(0)  # its destructors hang


if __name__ == "__main__":
    main()
