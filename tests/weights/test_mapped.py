"""The packed cache at work: the first start fills it, the second maps it, a bad one harms nobody.

All of it is shown on the plugin's `ExpertWeights`, as starts see it: each in a forked process, because a process has
one packed cache. The tests marked `nightly` show the same on servers; by day a server that starts again maps what it
packed in tests/operations/test_served.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import Running, launched, wait_until
from tiny_checkpoints import write_checkpoint
from weight_files import Ended

import kt_kernels
from kt_model.weights.packed import CacheKey, PackedLayer, read_entry, write_entry

SUPPORT = Path(__file__).parents[1] / "support"
UNPROVEN = ("proof.whole_model=off", "proof.text=warn")
PROMPT = "The quick brown fox jumps over"
METHODS = ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_mapped_experts_compute_bit_for_bit_what_packed_ones_do(
    method: str, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "manifest.json").write_text('{"shards": {"layer-00001.safetensors": {"sha256": "5"}}}')
    (weights / "model.safetensors").write_bytes(b"8 bytes.")
    rng = torch.Generator().manual_seed(0)
    pool = kt_kernels.ThreadPool(max(2, groups), nodes=groups)
    sizes: dict[str, Any] = {"num_experts": 3, "hidden_size": 96, "intermediate_size": 176, "method": method}
    moe = kt_kernels.MoE(**sizes, pool=pool)
    for expert in range(3):
        gate, up, down = (torch.randn(*shape, generator=rng).bfloat16() for shape in ((176, 96), (176, 96), (96, 176)))
        moe.load_expert(expert, gate, up, down)
    cache_key = CacheKey(weights, method, moe.packed_layout)
    entry = write_entry(cache_key, [PackedLayer(1, moe.intermediate_size, moe.packed_shards())])
    mapped = kt_kernels.MoE(**sizes, pool=pool, packed=entry.map_layer(1))
    x, ids = torch.randn(5, 96, generator=rng).bfloat16(), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    outs = []
    for layer in (moe, mapped):
        out = torch.empty(5, 96)
        layer.forward(x, ids, torch.full((5, 2), 0.5), None, out)
        outs.append(out)
    assert outs[0].abs().max() > 0
    assert torch.equal(outs[0], outs[1])


def said(running: Running) -> dict[str, Any]:
    """What the scheduler says of itself."""
    found: dict[str, Any] = running.client.get("/server_info").json()["internal_states"][0]["kt_launch"]
    return found


def cache_state(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = said(running)["packed_cache"]
    return found


def mapped_layers(running: Running) -> int:
    return sum(layer["mapped"] for layer in running.layers())


def mapped_files(running: Running) -> set[str]:
    """Layer files that a process of the server has mapped."""
    found = set()
    for process in running.server_processes():
        found |= {Path(each.path).name for each in process.memory_maps() if "/packed/" in each.path}
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("deepseek_v2", tmp_path_factory.mktemp("mapped") / "model")


@pytest.fixture(scope="module")
def runs(checkpoint: Path) -> Path:
    """The run folders, and below them the cache that these starts share."""
    return checkpoint.parent / "runs"


@pytest.fixture(scope="module")
def words(checkpoint: Path) -> tuple[str, ...]:
    adapter = Path(__file__).parent.parent / "fixtures" / "adapters" / "deepseek_v2" / "experts_r4"
    return ("model=auto", f"model.path={checkpoint}", f"lora=[{{name: r4, path: '{adapter}'}}]", *UNPROVEN)


@pytest.fixture(scope="module")
def first_answers(words: tuple[str, ...], runs: Path) -> Iterator[dict[str | None, dict[int, float]]]:
    """Of the first start, which packs, and fills the cache while it serves."""
    with launched(*words, runs=runs) as running:
        assert mapped_layers(running) == 0
        assert said(running)["unread_tensors"] == 0
        answers = {name: running.logprobs(PROMPT, name)[0] for name in (None, "r4")}
        wait_until(lambda: cache_state(running)["state"] == "written")
        entry = read_entry(Path(cache_state(running)["entry"]))
        assert entry.layers == [layer["layer"] for layer in running.layers()]
        assert entry.bytes >= sum(layer["packed_bytes"] for layer in running.layers())
    yield answers


@pytest.mark.nightly
@pytest.mark.server
def test_a_second_start_maps_what_the_first_packed(
    first_answers: dict[str | None, dict[int, float]], words: tuple[str, ...], runs: Path
) -> None:
    with launched(*words, runs=runs) as running:
        layers = running.layers()
        assert mapped_layers(running) == len(layers) == 2
        assert said(running)["unread_tensors"] == 3 * sum(layer["experts"] for layer in layers) > 0
        assert mapped_files(running) == {f"layer-{layer['layer']:05d}.safetensors" for layer in layers}
        for name, answer in first_answers.items():
            assert running.logprobs(PROMPT, name)[0] == answer
        assert any(f"{len(layers)} layers are mapped from the packed cache: {runs}" in line for line in running.output)
        assert cache_state(running)["state"] == "mapped"


STARTS = """
import hashlib, json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from sglang_in_process import forked
from safetensors.torch import load_file
from kt_model.digests import SETTLED_NS
from kt_model.families import FAMILIES, expert_weights
from kt_sglang.checkpoint import packed
from kt_sglang.moe.placement import Placement
from kt_sglang.checkpoint.weights import PROJECTIONS, ExpertWeights

LAYERS, EXPERTS, HIDDEN = (1, 2), 8, 128

def start(checkpoint, tensors):
    layers, settings = [], {"weight_path": checkpoint, "method": "AMXBF16_SFT", "cpuinfer_threads": 1}
    for number in LAYERS:
        config = SimpleNamespace(layer_idx=number, threadpool_count=1, **settings)
        layer = ExpertWeights(config, SimpleNamespace(moe_tp_rank=0, moe_tp_size=1), Placement(EXPERTS), HIDDEN)
        load = layer.loader(None)
        for expert in range(EXPERTS):
            gate, up, down = (tensors[name] for name in expert_weights(FAMILIES["deepseek_v2"], number, expert))
            for name, weight in zip(PROJECTIONS, (gate, up, down), strict=True):
                load(None, weight, "", name, expert)
        layer.require_complete()
        layers.append(layer)
    begun = packed.report()
    packed.after_load_model(None)
    while packed.report()["state"] not in ("written", "mapped", "not written"):
        time.sleep(0.1)
    parts = [bytes(part) for layer in layers for part in layer.moe.packed_shards()]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    print(json.dumps({"mapped": [layer.mapped for layer in layers], "begun": begun, "ended": packed.report(),
        "sha256": digest}), flush=True)

def damage(cache):
    (file, *_) = sorted(Path(cache).glob("packed/*/layer-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)

checkpoint, cache, no_cache = sys.argv[1:]
written = max(file.stat().st_ctime_ns for file in Path(checkpoint).iterdir())
time.sleep(max(0, written + SETTLED_NS - time.time_ns()) / 1e9 + 0.1)  # so that its digests are cached
tensors = load_file(Path(checkpoint) / "model.safetensors")
os.environ["KT_LAUNCH_CACHE"] = cache
assert forked(lambda: start(checkpoint, tensors)) and forked(lambda: start(checkpoint, tensors))
damage(cache)
assert forked(lambda: start(checkpoint, tensors)) and forked(lambda: start(checkpoint, tensors))
os.environ["KT_LAUNCH_CACHE"] = no_cache
assert forked(lambda: start(checkpoint, tensors))
"""
Start = dict[str, Any]


@pytest.fixture(scope="module")
def starts(checkpoint: Path) -> list[Start]:
    """What five starts said: two with a sound cache, two after a byte of it was changed, one that cannot write it."""
    no_cache = checkpoint.parent / "a file"
    no_cache.touch()
    places = [str(path) for path in (checkpoint, checkpoint.parent / "cache", no_cache)]
    code = f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n{STARTS}"
    done = subprocess.run([sys.executable, "-P", "-c", code, *places], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # beside the loading's own


def test_a_start_maps_what_one_before_it_packed(starts: list[Start]) -> None:
    first, second, *_ = starts
    assert (first["mapped"], first["begun"]["state"], first["ended"]["state"]) == ([False] * 2, "none", "written")
    assert (second["mapped"], second["begun"]["state"], second["ended"]["state"]) == ([True] * 2, "mapped", "mapped")
    assert first["sha256"] == second["sha256"]


def test_a_corrupt_entry_is_told_packed_anew_and_written_anew(starts: list[Start]) -> None:
    first, _, third, fourth, _ = starts
    assert (third["mapped"], third["begun"]["state"], third["ended"]["state"]) == ([False] * 2, "unsound", "written")
    assert "layer-00001.safetensors" in third["begun"]["problem"] and "has SHA-256" in third["begun"]["problem"]
    assert fourth["mapped"] == [True] * 2
    assert {third["sha256"], fourth["sha256"]} == {first["sha256"]}


def test_a_cache_that_cannot_be_written_is_told_and_the_experts_are_packed(starts: list[Start]) -> None:
    """Nobody may write below a file, root neither."""
    first, *_, last = starts
    assert (last["mapped"], last["ended"]["state"], last["sha256"]) == ([False] * 2, "not written", first["sha256"])
    assert "a file/packed" in last["ended"]["problem"]


def test_the_plan_warns_of_a_cache_that_cannot_be_written(
    launch: Callable[..., Ended], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may write below a file, root neither."""
    (tmp_path / "packed").touch()
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path))
    ended = launch("action=plan", "server.device=cpu", "model=auto", f"model.path={checkpoint}", "lora=none")
    assert ended.code == 0
    assert f"warning: kt.packed_cache: {tmp_path}/packed cannot be written" in ended.out


@pytest.mark.nightly
@pytest.mark.server
def test_a_servers_corrupt_entry_is_said_and_written_anew(
    first_answers: dict[str | None, dict[int, float]], words: tuple[str, ...], runs: Path
) -> None:
    (file, *_) = sorted((runs / "cache" / "packed").glob("*/layer-*.safetensors"))
    content = np.fromfile(file, np.uint8)
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content.tobytes())
    with launched(*words, runs=runs) as running:
        assert mapped_layers(running) == 0
        assert [line for line in running.output if "packed cache: " in line and "has SHA-256" in line]
        for name, answer in first_answers.items():
            assert running.logprobs(PROMPT, name)[0] == answer
        wait_until(lambda: cache_state(running)["state"] == "written")
        assert file.read_bytes() != content.tobytes()


@pytest.mark.nightly
@pytest.mark.server
def test_a_servers_cache_that_cannot_be_written_is_a_warning(
    first_answers: dict[str | None, dict[int, float]], words: tuple[str, ...], runs: Path
) -> None:
    cache = runs / "a cache"
    cache.mkdir()
    (cache / "packed").touch()
    with launched(*words, runs=runs, env={"KT_LAUNCH_CACHE": str(cache)}) as running:
        warned = (runs / "stderr.txt").read_text()
        assert f"warning: kt.packed_cache: {cache}/packed cannot be written" in warned
        wait_until(lambda: cache_state(running)["state"] == "not written")
        assert f"{cache}/packed" in str(cache_state(running)["problem"])
        assert running.logprobs(PROMPT)[0] == first_answers[None]
