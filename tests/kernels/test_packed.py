"""Packed weights outside of the layer that packed them: in a file, mapped by others, refused if they do not fit."""

from __future__ import annotations

import gc
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Batch, Layer, build, forward, random_batch, random_layer, random_lora

import kt_kernels

PAGE = 4096


def options(layer: Layer, method: str = "AMXBF16_SFT", isa: str = "auto", nodes: int = 1) -> dict[str, Any]:
    experts, hidden, intermediate = layer.sizes
    pool = kt_kernels.ThreadPool(2, nodes=nodes)
    return {
        "num_experts": experts,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "method": method,
        "isa": isa,
        "pool": pool,
    }


def write(moe: kt_kernels.MoE, path: Path) -> list[tuple[int, int]]:
    """One file, each shard at a page's start; returns offset and size of each."""
    places = []
    with path.open("wb") as file:
        for shard in moe.packed_shards():
            file.seek(-(-file.tell() // PAGE) * PAGE)
            places.append((file.tell(), shard.nbytes))
            file.write(shard.data)
    return places


def mapped(path: Path, places: list[tuple[int, int]]) -> list[np.ndarray]:
    whole = np.memmap(path, mode="r", dtype=np.uint8)
    return [whole[offset : offset + size] for offset, size in places]


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_a_mapped_file_serves_as_the_weights_did(tmp_path: Path, isa: str, method: str, nodes: int) -> None:
    layer = random_layer(3, 100, 136)  # 3 steps of 64: a group each, the last one mostly padding
    layer.adapters[0] = random_lora(layer, 8)
    packed = build(layer, isa, method, nodes=nodes)
    places = write(packed, tmp_path / "packed")
    moe = kt_kernels.MoE(**options(layer, method, isa, nodes), packed=mapped(tmp_path / "packed", places))
    moe.set_adapter(0, layer.adapters[0].packed())
    assert len(places) == nodes
    assert moe.packed_bytes == packed.packed_bytes == sum(size for _, size in places)
    for tokens in (1, 40):
        batch = random_batch(layer, tokens, 2, slots=(-1, 0))
        assert torch.equal(forward(moe, batch), forward(packed, batch)), f"{tokens} tokens"


def test_a_group_without_a_share_is_an_empty_array() -> None:
    layer = random_layer(2, 64, 64)
    packed = build(layer, "auto", nodes=3)
    shards = packed.packed_shards()
    assert sorted(shard.nbytes > 0 for shard in shards) == [False, False, True]
    batch = random_batch(layer, 4, 2)
    moe = kt_kernels.MoE(**options(layer, nodes=3), packed=shards)
    assert torch.equal(forward(moe, batch), forward(packed, batch))


def test_views_and_layers_keep_each_other_alive() -> None:
    """Names go in the wrong order; what is still used must not go with them."""
    layer = random_layer(2, 64, 64)
    batch = random_batch(layer, 4, 2)
    packed = build(layer, "auto")
    expected = forward(packed, batch)
    shards = packed.packed_shards()
    del packed
    gc.collect()
    moe = kt_kernels.MoE(**options(layer), packed=shards)
    del shards
    gc.collect()
    build(random_layer(2, 64, 64, seed=9), "auto")  # would reuse memory that was let go
    assert torch.equal(forward(moe, batch), expected)


def test_views_are_read_only(method: str) -> None:
    (shard,) = build(random_layer(2, 64, 64), "auto", method).packed_shards()
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1


def test_two_processes_share_one_mapped_file(tmp_path: Path) -> None:
    layer = random_layer(4, 256, 512)
    packed = build(layer, "auto")
    places = write(packed, tmp_path / "packed")
    batch = random_batch(layer, 5, 2)
    expected = forward(packed, batch)
    moe = kt_kernels.MoE(**options(layer), packed=mapped(tmp_path / "packed", places))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(forward(moe, batch), expected) else 2
        finally:
            os._exit(code)
    assert torch.equal(forward(moe, batch), expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    mappings = Path("/proc/self/smaps").read_text().split(str(tmp_path / "packed"))
    assert len(mappings) > 1, "the weights are the file's own pages"
    assert re.search(r"^Anonymous: +0 kB$", mappings[1], re.MULTILINE), "none of them was copied"


def refused(layer: Layer, packed: Any, error: type[Exception], match: str, **changes: Any) -> None:
    with pytest.raises(error, match=match):
        kt_kernels.MoE(**options(layer, **changes), packed=packed)


def test_arrays_that_do_not_fit_are_refused(method: str) -> None:
    layer = random_layer(3, 64, 128)
    shards = build(layer, "auto", method, nodes=2).packed_shards()
    size = shards[0].nbytes
    same = {"method": method, "nodes": 2}
    refused(layer, shards[:1], ValueError, "packed: expected one array for each of the pool's 2 groups, got 1", **same)
    refused(layer, [], ValueError, "packed: expected one array per pool group, got none", **same)
    refused(
        layer,
        [shards[0], shards[1][:-64]],
        ValueError,
        rf"packed\[1\]: expected {size} bytes, got {size - 64}; pack these weights again",
        **same,
    )
    shifted = np.zeros(size + 128, np.uint8)
    start = 1 - shifted.ctypes.data % 64 + 64
    off = shifted[start : start + size]
    refused(layer, [shards[0], off], ValueError, r"packed\[1\]: expected an address that is a multiple of 64", **same)
    refused(
        layer,
        [shards[0].view(np.int8), shards[1]],
        TypeError,
        r"packed\[0\]: expected dtype uint8, got format b",
        **same,
    )
    refused(layer, [shards[0], None], TypeError, r"packed\[1\]: expected an array of uint8, got NoneType", **same)
    refused(layer, [shards[0].reshape(2, -1), shards[1]], ValueError, r"packed\[0\]: expected one dimension", **same)
    refused(
        layer,
        [np.zeros(2 * size, np.uint8)[::2], shards[1]],
        ValueError,
        r"packed\[0\]: expected one dimension",
        **same,
    )
    refused(layer, 7, TypeError, "packed: expected a sequence of arrays, got int", **same)


def test_weights_of_another_layer_size_are_refused() -> None:
    shards = build(random_layer(3, 64, 128), "auto").packed_shards()
    refused(random_layer(4, 64, 128), shards, ValueError, r"packed\[0\]: expected \d+ bytes, got \d+")


def test_packed_weights_cannot_be_loaded_over(method: str) -> None:
    layer = random_layer(2, 64, 64)
    packed = build(layer, "auto", method)
    batch = random_batch(layer, 3, 2)
    moe = kt_kernels.MoE(**options(layer, method), packed=packed.packed_shards())
    before = forward(moe, batch)
    with pytest.raises(ValueError, match="load_expert: this layer reads packed weights, which are never written"):
        moe.load_expert(0, *random_layer(2, 64, 64, seed=8).matrices(0))
    assert torch.equal(forward(moe, batch), before)


def test_half_loaded_weights_are_not_given_out() -> None:
    layer = random_layer(3, 64, 64)
    moe = kt_kernels.MoE(**options(layer))
    moe.load_expert(0, *layer.matrices(0))
    with pytest.raises(ValueError, match="packed_shards: expert 1 is not loaded, expected all 3"):
        moe.packed_shards()


def test_the_layout_names_what_the_bytes_depend_on(method: str) -> None:
    layer = random_layer(2, 64, 64)
    pool = kt_kernels.ThreadPool(3, nodes=2)
    layout = kt_kernels.packed_layout(method=method, pool=pool)
    assert layout == build(layer, "auto", method, nodes=2).packed_layout
    others = {"AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT"} - {method}
    differing = {kt_kernels.packed_layout(method=other, pool=pool) for other in others}
    differing.add(kt_kernels.packed_layout(method=method, pool=kt_kernels.ThreadPool(3)))
    assert layout not in differing
    assert layout == kt_kernels.packed_layout(method=method, pool=kt_kernels.ThreadPool(1, nodes=2))
    with pytest.raises(ValueError, match="method: 'FP8' is not known"):
        kt_kernels.packed_layout(method="FP8", pool=pool)


def test_every_instruction_set_packs_the_same_bytes(isa: str, method: str) -> None:
    layer = random_layer(2, 100, 72)
    own, reference = (build(layer, name, method).packed_shards()[0] for name in (isa, "reference"))
    assert np.array_equal(own, reference)


# Version and bytes that fixed weights are packed to. A change of the bytes makes files that users keep worthless: it
# needs a new layout_version in kernels/format.cpp first, and a new sum here.
KNOWN_BYTES = {
    "AMXBF16_SFT": (1, "abd8229e3448713e"),
    "AMXINT8_SFT": (1, "4225a4227582f66a"),
    "AMXINT4_SFT": (2, "564703ad054adc71"),
}


def test_the_bytes_of_this_version_never_change(method: str) -> None:
    grid = torch.arange(2 * 100 * 72, dtype=torch.int64).mul(48271).remainder(65521).float().div(32760.5).sub(1)
    wide = grid.view(2, 72, 100).bfloat16()
    layer = Layer(wide, wide.flip(1).contiguous(), wide.transpose(1, 2).contiguous())
    moe = build(layer, "reference", method, nodes=2)
    version, known = KNOWN_BYTES[method]
    assert moe.packed_layout.startswith(f"version={version}/")
    digest = hashlib.sha256(b"".join(shard.tobytes() for shard in moe.packed_shards())).hexdigest()
    assert digest[:16] == known


def test_memory_of_a_packed_layer_is_the_files() -> None:
    """Building a layer on 64 MiB of packed weights takes none of its own."""
    layer = random_layer(16, 1024, 688)
    shards = build(layer, "auto").packed_shards()
    before = resident_kib()
    moe = kt_kernels.MoE(**options(layer), packed=shards)
    assert resident_kib() - before < 2048
    batch = random_batch(layer, 2, 2)
    assert torch.isfinite(forward(moe, Batch(batch.x, batch.ids, batch.weights))).all()


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * (os.sysconf("SC_PAGE_SIZE") // 1024)
