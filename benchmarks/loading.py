"""How fast a layer becomes usable and what memory that takes at most: packed from bf16, or mapped from a packed file.

Each is measured in a process of its own, so that nothing else counts: python benchmarks/loading.py TASK.
"""

import json
import mmap
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import host
import numpy as np
from cases import SHAPES, AdapterCase, Batch, Shape, Weights, make_batch

import kt_kernels

Row = dict[str, Any]
PAGE = 4096


def measure(shape: Shape, method: str, isa: str, threads: int) -> Row:
    """Packing and mapping, both over the warm read rate: that of the packed file out of the page cache, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"shape": shape.name, "experts": shape.experts, "method": method, "isa": isa, "threads": threads}
        row: Row = sizes | _run({**sizes, "task": "pack", "folder": folder})
        row |= _run({**sizes, "task": "map", "folder": folder})
        return row | {"of_read_rate": row["source_gbs"] / row["file_read_gbs"]}


def _run(task: Row) -> Row:
    command = [sys.executable, __file__, json.dumps(task)]
    found: Row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def pack(shape: Shape, task: Row) -> Row:
    weights, pool = Weights(shape), kt_kernels.ThreadPool(task["threads"])
    fresh_gbs = _touch(shape.bf16_bytes)
    before = host.resident_bytes()
    moe = kt_kernels.MoE(**_sizes(shape), method=task["method"], isa=task["isa"], pool=pool)
    start = time.perf_counter()
    for expert in range(shape.experts):
        moe.load_expert(expert, *weights.expert(expert))
    seconds = time.perf_counter() - start
    found = {
        "source_gbs": shape.bf16_bytes / seconds / 1e9,
        "fresh_memory_gbs": fresh_gbs,
        "packed_bytes": moe.packed_bytes,
        "bits_per_weight": 8 * moe.packed_bytes / (shape.experts * shape.expert_weights),
        "peak_over_packed": (_peak_bytes() - before) / moe.packed_bytes,
    }
    for number, shard in enumerate(moe.packed_shards()):
        shard.tofile(Path(task["folder"]) / str(number))
    return found


def _touch(size: int) -> float:
    """Rate at which new memory can be had. A virtual machine may have to ask its host for it, at a rate far below that
    of any packing; what was touched here and freed is at hand for the packing that follows."""
    start = time.perf_counter()
    memory = mmap.mmap(-1, size)
    for page in range(0, size, PAGE):
        memory[page] = 1
    seconds = time.perf_counter() - start
    memory.close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory counts from here
    return size / seconds / 1e9


def map_packed(shape: Shape, task: Row) -> Row:
    """Mapping takes until the first batch that uses every expert is answered, less what such a batch takes anyway."""
    files = sorted(Path(task["folder"]).iterdir())
    read_s = min(_read(files) for _ in range(3))
    pool, batch = kt_kernels.ThreadPool(task["threads"]), make_batch(shape, 64, AdapterCase("none"), seed=1)
    before, size = host.resident_bytes(), sum(file.stat().st_size for file in files)
    start = time.perf_counter()
    shards = [_mapped(file) for file in files]
    options: Row = {"method": task["method"], "isa": task["isa"], "pool": pool, "packed": shards}
    moe = kt_kernels.MoE(**_sizes(shape), **options)
    made_s = time.perf_counter() - start
    first_s, again_s = _forward(moe, batch), min(_forward(moe, batch) for _ in range(3))
    mapped_s = made_s + first_s - again_s
    return {
        "mapped_ms": made_s * 1e3,
        "mapped_gbs": size / mapped_s / 1e9,
        "file_read_gbs": size / read_s / 1e9,
        "mapped_of_file_read": read_s / mapped_s,
        "mapped_peak_over_packed": (_peak_bytes() - before) / size,
    }


def _sizes(shape: Shape) -> dict[str, Any]:
    return {
        "num_experts": shape.experts,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
    }


def _mapped(file: Path) -> Any:
    with file.open("rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def _read(files: list[Path]) -> float:
    """Seconds to read the files, which lie in the page cache, into a buffer that is reused."""
    buffer = memoryview(bytearray(1 << 22))
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def _forward(moe: kt_kernels.MoE, batch: Batch) -> float:
    out = batch.x.clone()
    start = time.perf_counter()
    moe.forward(batch.x, batch.ids, batch.weights, None, out)
    return time.perf_counter() - start


def _peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def main() -> None:
    task = json.loads(sys.argv[1])
    shape = SHAPES[task["shape"]].with_experts(task["experts"])
    print(json.dumps({"pack": pack, "map": map_packed}[task["task"]](shape, task)))


if __name__ == "__main__":
    main()
