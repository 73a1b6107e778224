"""How long a server takes to load its experts: packing them at a first start, mapping them at the next, beside the rate
at which safetensors reads the same files from the same disk, all in one run: python benchmarks/load_times.py --help.

The checkpoint is made for it: DeepSeek-V2-Lite's expert shapes, few layers. "cold" means that its files and the cache
were put out of the page cache before; what else runs on the machine is not.
"""

import argparse
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import httpx
import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kt_launch.machine.folders import demo_folder
from kt_model.families import FAMILIES, expert_weights

KT_LAUNCH = Path(sys.executable).with_name("kt-launch")
HIDDEN, INNER, EXPERTS, HEADS = 2048, 1408, 64, 16
LOADED = re.compile(r"Load weight end.*?elapsed=([\d.]+)")
LIMIT_S = 600.0

Row = dict[str, Any]


def make_checkpoint(folder: Path, layers: int) -> Path:
    """The demo's tokenizer and configuration, real expert shapes, one dense layer and `layers` of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(demo_folder("model"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    changes = {
        "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "num_experts_per_tok": 6,
        "num_hidden_layers": layers + 1, "first_k_dense_replace": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
    }  # fmt: skip
    config = AutoConfig.from_pretrained(folder, **changes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    rest = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.02).bfloat16()
        for name, shape in shapes.items()
        if ".mlp.experts." not in name
    }
    files = {"model-00000.safetensors": rest} | {
        f"model-{layer:05d}.safetensors": dict(_experts(layer, rng)) for layer in range(1, layers + 1)
    }
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    places = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _experts(layer: int, rng: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = [torch.randn(shape, generator=rng) * 0.02 for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))]
    for expert in range(EXPERTS):
        for name, block in zip(expert_weights(FAMILIES["deepseek_v2"], layer, expert), blocks, strict=True):
            yield name, (block * (1 + expert / EXPERTS)).bfloat16()


def evict(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_safetensors(checkpoint: Path) -> float:
    """GB/s of safetensors: every tensor of every file once, in one thread."""
    start, size = time.perf_counter(), 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                tensor = tensors.get_tensor(name).clone()
                size += tensor.nbytes
    return size / (time.perf_counter() - start) / 1e9


def touch_packed(folder: Path) -> float:
    """GB/s of the cache's files as a server gets them: mapped, read ahead, a byte of every page in order."""
    files = sorted((folder / "cache" / "packed").rglob("layer-*.safetensors"))
    begun, size = time.perf_counter(), 0
    for file in files:
        with file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        pages.madvise(mmap.MADV_WILLNEED)
        np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE].max()
        size += file.stat().st_size
    return size / (time.perf_counter() - begun) / 1e9


def start(checkpoint: Path, folder: Path, *overrides: str, wait_written: bool = False) -> Row:
    """One start of the server up to its proof: seconds of SGLang's loading, of all, and what the scheduler read."""
    env = {**os.environ, "KT_LAUNCH_CACHE": str(folder / "cache"), "KT_LAUNCH_RUNS": str(folder / "runs")}
    words = [
        "model=auto",
        f"model.path={checkpoint}",
        "lora=none",
        "server=cpu",
        "server.context_length=256",
        "proof.whole_model=off",  # of loading, and random weights predict no text
        "proof.text=warn",
        *overrides,
    ]
    begun = time.perf_counter()
    process = subprocess.Popen([str(KT_LAUNCH), *words], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_folder, url = folder, ""
    for line in process.stdout:
        if line.startswith("run: "):
            run_folder = Path(line.removeprefix("run: ").strip())
        if line.startswith("ready: "):
            url = line.removeprefix("ready: ").strip()
            break
    ready_s = time.perf_counter() - begun
    try:
        cache = _wait_written(url) if wait_written else _cache_state(url)
        loaded = LOADED.search((run_folder / "server.log").read_text())
        children = psutil.Process(process.pid).children(recursive=True)
        scheduler = max(children, key=lambda child: child.memory_info().rss)
        return {
            "load_s": float(loaded[1]) if loaded else None,
            "ready_s": ready_s,
            "read_from_disk_gb": scheduler.io_counters().read_bytes / 1e9,
            "cache": cache,
        }
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _cache_state(url: str) -> str:
    state = httpx.get(f"{url}/server_info", trust_env=False, timeout=60).json()["internal_states"][0]
    return str(state["kt_launch"]["packed_cache"]["state"])


def _wait_written(url: str) -> str:
    deadline = time.monotonic() + LIMIT_S
    while (state := _cache_state(url)) not in ("written", "not written") and time.monotonic() < deadline:
        time.sleep(1)
    return state


def measure(folder: Path, layers: int, method: str) -> dict[str, Any]:
    checkpoint = make_checkpoint(folder / "model", layers)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    rows: dict[str, Row] = {}
    evict(checkpoint)
    rates = {"cold": read_safetensors(checkpoint), "warm": read_safetensors(checkpoint)}
    options = (f"kt.method={method}", *(["kt.prepare=true"] if method != "AMXBF16_SFT" else []))
    if method != "AMXBF16_SFT":
        subprocess.run(
            [str(KT_LAUNCH), "action=quantize", "model=auto", f"model.path={checkpoint}", f"kt.method={method}"],
            env={**os.environ, "KT_LAUNCH_CACHE": str(folder / "cache")}, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    evict(folder)
    rows["first, cold"] = start(checkpoint, folder, *options, wait_written=True)
    evict(folder)
    rows["cached, cold"] = start(checkpoint, folder, *options)
    rows["cached, warm"] = start(checkpoint, folder, *options)
    read_safetensors(checkpoint)
    rows["first, warm"] = start(checkpoint, folder, *options, "kt.packed_cache=off")
    evict(folder / "cache")
    touched = {"cold": touch_packed(folder), "warm": touch_packed(folder)}
    packed = sum(file.stat().st_size for file in (folder / "cache" / "packed").rglob("*.safetensors"))
    sizes = {"checkpoint_gb": size / 1e9, "packed_gb": packed / 1e9}
    return {"method": method, **sizes, "safetensors_gbs": rates, "mapped_gbs": touched, "starts": rows}


def show(found: dict[str, Any]) -> None:
    """Times beside what safetensors would take to read the checkpoint."""
    rates, size = found["safetensors_gbs"], found["checkpoint_gb"]
    print(f"{found['method']}: checkpoint {size:.2f} GB, packed {found['packed_gb']:.2f} GB")
    for temperature, rate in rates.items():
        mapped = f"packed files through their mapping {found['mapped_gbs'][temperature]:.2f} GB/s"
        print(f"  {temperature}: safetensors {rate:.2f} GB/s, the checkpoint in {size / rate:.1f} s; {mapped}")
    for name, row in found["starts"].items():
        read_s = size / rates["cold" if "cold" in name else "warm"]
        share = f"{read_s / row['load_s']:.0%} of the read rate"
        if row["cache"] == "mapped":
            share = "mapped, pages come as they are used"
        print(
            f"  {name} start: loaded in {row['load_s']} s ({share}), ready in {row['ready_s']:.1f} s, "
            f"{row['read_from_disk_gb']:.2f} GB from the disk, cache {row['cache']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=3, help="MoE layers; 1.1 GB each in bf16")
    parser.add_argument("--method", default="AMXBF16_SFT")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one when not given")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = measure(Path(folder), given.layers, given.method)
    show(found)
    if given.json:
        given.json.write_text(json.dumps({"host": host.facts(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
