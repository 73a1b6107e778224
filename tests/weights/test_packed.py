"""The packed cache as files: what it is keyed by, how a bad entry is known, and action=cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launching import ended_with_the_test
from small_disk import in_small_disk
from weight_files import Ended, snapshot, write_checkpoint

from kt_model import digests
from kt_model.digests import Digests
from kt_model.errors import LaunchError
from kt_model.weights.caching import read_cache
from kt_model.weights.packed import (
    ALIGNMENT,
    CacheKey,
    PackedLayer,
    find_entry,
    packed_root,
    read_entry,
    remember_digests,
    write_entry,
)

Launch = Callable[..., Ended]
LAYERS = 3


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a clock that is trusted after a tick, so that tests need not wait for the cautious two seconds."""
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(cache))
    monkeypatch.setattr(digests, "SETTLED_NS", 20_000_000)


def packed_layers(seed: int = 0) -> list[PackedLayer]:
    """Two parts a layer, of odd sizes; the second layer's second part is empty."""
    rng = np.random.default_rng(seed)
    sizes = [(70_001, 4096), (12, 0), (64, 100_000)]
    return [
        PackedLayer(number + 1, 64, [rng.integers(0, 256, size, np.uint8) for size in sizes[number]])
        for number in range(LAYERS)
    ]


@pytest.fixture
def cache_key(tmp_path: Path) -> CacheKey:
    checkpoint = write_checkpoint(tmp_path / "tiny", shards=2)
    return CacheKey(checkpoint, "bf16", "layout 1, avx2, 2 shards")


def settle() -> None:
    """Wait until digests of what was just written are remembered."""
    time.sleep(0.05)


def hash_weights(cache_key: CacheKey) -> None:
    """As a launch does it beside its first start."""
    settle()
    with Digests() as remembered:
        for file in cache_key.weight_path.glob("*.safetensors"):
            remembered.sha256(file)


def test_what_was_written_is_mapped_at_page_boundaries(cache_key: CacheKey) -> None:
    hash_weights(cache_key)
    assert find_entry(cache_key) is None
    layers = packed_layers()
    written = write_entry(cache_key, layers)
    entry = find_entry(cache_key)
    assert entry is not None
    assert (entry.path, entry.layers) == (written.path, [1, 2, 3])
    for one in layers:
        mapped = entry.map_layer(one.layer)
        assert entry.intermediate_size(one.layer) == 64
        assert [part.tobytes() for part in mapped] == [part.tobytes() for part in one.parts]
        assert [part.ctypes.data % ALIGNMENT for part in mapped if part.nbytes] == [0] * len(
            [p for p in mapped if p.nbytes]
        )
        assert not any(part.flags.writeable for part in mapped)


def test_an_entry_is_found_only_when_the_hashes_are_known(cache_key: CacheKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no start reads a whole checkpoint just to know whether it would not need to."""
    with monkeypatch.context() as just_written:
        just_written.setattr(digests, "SETTLED_NS", 1 << 60)  # however long writing takes here
        write_entry(cache_key, packed_layers())
        assert find_entry(cache_key) is None
    hash_weights(cache_key)
    assert find_entry(cache_key) is not None


@pytest.mark.parametrize(
    "change", [{"method": "int8"}, {"layout": "layout 2"}, {"resident": "first 1"}, {"tp_rank": 1}, {"tp_size": 2}]
)
def test_another_method_layout_or_part_is_another_entry(cache_key: CacheKey, change: dict[str, object]) -> None:
    hash_weights(cache_key)
    (cache_key.weight_path / "manifest.json").write_text('{"shards": {"layer-00001": {"sha256": "of int8 experts"}}}')
    first = write_entry(cache_key, packed_layers())
    other = replace(cache_key, **change)  # type: ignore[arg-type]
    assert find_entry(other) is None
    assert write_entry(other, packed_layers(1)).path != first.path
    assert find_entry(cache_key) == first


def test_other_weights_are_another_entry_and_moved_ones_the_same(cache_key: CacheKey, tmp_path: Path) -> None:
    hash_weights(cache_key)
    first = write_entry(cache_key, packed_layers())
    moved = cache_key.weight_path.rename(tmp_path / "elsewhere")
    assert find_entry(replace(cache_key, weight_path=moved)) == first
    shard = sorted(moved.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    hash_weights(replace(cache_key, weight_path=moved))
    assert find_entry(replace(cache_key, weight_path=moved)) is None


def damage_content(entry: Path) -> None:
    file = entry / "layer-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)


def cut_short(entry: Path) -> None:
    file = entry / "layer-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def remove_file(entry: Path) -> None:
    (entry / "layer-00001.safetensors").unlink()


def break_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("{")


def change_key(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["key"]["layout"] = "layout 0"
    (entry / "manifest.json").write_text(json.dumps(manifest))


def leave_its_folder(entry: Path) -> None:
    """A manifest that names a file elsewhere."""
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["shards"]["../../x"] = manifest["shards"].pop("layer-00001.safetensors")
    (entry / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    damage_content: "layer-00002.safetensors: has SHA-256",
    cut_short: "layer-00003.safetensors: is missing or not the",
    remove_file: "layer-00001.safetensors: is missing or not the",
    break_manifest: "is not an entry of the packed cache, or an incomplete one",
    leave_its_folder: "is of another format",
}


@pytest.mark.parametrize("damage", [*DAMAGES, change_key], ids=lambda damage: damage.__name__)
def test_a_bad_entry_is_named_and_written_anew(
    damage: Callable[[Path], None], cache_key: CacheKey, launch: Launch, cache: Path
) -> None:
    hash_weights(cache_key)
    entry = write_entry(cache_key, packed_layers())
    settle()
    remember_digests(entry)
    damage(entry.path)
    with pytest.raises(LaunchError, match="was packed from something else" if damage is change_key else None):
        find_entry(cache_key)
    if damage in DAMAGES:
        done = launch("action=cache", "cache.do=verify")
        assert done.code == 2
        assert DAMAGES[damage] in done.err
        assert launch("action=cache", "cache.do=prune").out.startswith(f"removed: {entry.path}")
        assert not list(packed_root().iterdir())
        write_entry(cache_key, packed_layers())
        assert find_entry(cache_key) == read_entry(entry.path)


def test_nothing_is_read_of_a_remembered_entry(cache_key: CacheKey) -> None:
    """A second start may not read what it maps."""
    hash_weights(cache_key)
    entry = write_entry(cache_key, packed_layers())
    settle()
    remember_digests(entry)
    with Digests() as remembered:
        entry.verify(remembered.sha256)
        assert remembered.bytes_read == 0


def test_bits_that_rot_on_the_disk_are_found_by_verify_and_known_from_then_on(
    cache_key: CacheKey, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's times say nothing changed: only reading tells."""
    hash_weights(cache_key)
    entry = write_entry(cache_key, packed_layers())
    settle()
    digests_file = packed_root().parent / "digests.json"
    damage_content(entry.path)
    settle()
    remember_digests(read_entry(entry.path))  # as if it had been damaged below the file system
    assert find_entry(cache_key) == entry
    assert digests_file.is_file()
    assert launch("action=cache").out.count(" whole ") == 1
    assert launch("action=cache", "cache.do=verify").code == 2
    assert "broken: " in launch("action=cache").out
    with pytest.raises(LaunchError, match="has SHA-256"):
        find_entry(cache_key)


def test_what_changed_between_writing_and_remembering_is_read_at_the_next_start(cache_key: CacheKey) -> None:
    hash_weights(cache_key)
    entry = write_entry(cache_key, packed_layers())
    damage_content(entry.path)
    settle()
    remember_digests(entry)
    with pytest.raises(LaunchError, match=r"layer-00002\.safetensors: has SHA-256"):
        find_entry(cache_key)


def test_weights_that_changed_while_they_were_packed_are_not_kept(cache_key: CacheKey) -> None:
    before = cache_key.stamps()
    shard = sorted(cache_key.weight_path.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LaunchError, match="was changed while it was loaded"):
        write_entry(cache_key, packed_layers(), before=before)
    assert not packed_root().exists()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from kt_model.weights.packed import PackedLayer, CacheKey, write_entry
layers = [PackedLayer(n, 64, [np.full(1 << 20, n, np.uint8)]) for n in range(6)]
def rest():
    print("piece", flush=True)
    sys.stdin.readline()
entry = write_entry(CacheKey(Path(sys.argv[1]), "bf16", "layout 1"), layers, rest)
print(entry.path)
"""
"""After each piece it waits for a line, or for the end of its input."""


def writer(checkpoint: Path) -> subprocess.Popen[str]:
    words, pipe = [sys.executable, "-c", textwrap.dedent(WRITER), str(checkpoint)], subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def stopped_after(pieces: int, checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """A writer that is at work and stands still."""
    with ended_with_the_test(writer(checkpoint)) as process:
        assert process.stdin is not None and process.stdout is not None
        for number in range(pieces):
            if number:
                print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "piece\n"
        yield process


def test_a_killed_writer_leaves_no_entry_and_the_next_goes_on(cache_key: CacheKey, launch: Launch) -> None:
    with stopped_after(3, cache_key.weight_path) as first:
        assert " being made " in launch("action=cache").out
        assert "kept: " not in launch("action=cache", "cache.do=prune").out
        first.kill()
    (partial,) = packed_root().glob("*.partial")
    done = {file.name: file.stat().st_mtime_ns for file in partial.glob("layer-*.safetensors")}
    assert done
    assert " unfinished " in launch("action=cache").out
    second = writer(cache_key.weight_path)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    entry = Path(out.splitlines()[-1])
    assert {name: (entry / name).stat().st_mtime_ns for name in done} == done
    assert read_entry(entry).layers == list(range(6))
    assert not partial.exists()


def test_an_unfinished_entry_is_pruned_when_nobody_makes_it(cache_key: CacheKey, launch: Launch) -> None:
    with stopped_after(1, cache_key.weight_path) as first:
        first.kill()
    assert launch("action=cache", "cache.do=prune").out.startswith("removed: ")
    assert not list(packed_root().iterdir())


def test_two_that_write_the_same_do_it_once(cache_key: CacheKey) -> None:
    with (
        stopped_after(1, cache_key.weight_path) as first,
        ended_with_the_test(writer(cache_key.weight_path)) as second,
    ):
        _, second_err = second.communicate(timeout=300)
        assert "is being written by another process" in second_err
        first_out, first_err = first.communicate(timeout=300)
    assert first.returncode == 0, first_err
    assert read_entry(Path(first_out.splitlines()[-1])).layers == list(range(6))


COMES_AND_GOES = """
import os, shutil, sys
from pathlib import Path
entry = Path(sys.argv[1])
partial = entry.with_name(entry.name + ".partial")
while True:
    partial.mkdir()
    for name in "abc":
        (partial / (name + ".tmp")).write_text("piece")
        (partial / (name + ".tmp")).rename(partial / name)
    partial.rename(entry)
    shutil.rmtree(entry)
"""


def test_the_cache_is_listed_while_others_make_and_remove_entries(cache_key: CacheKey) -> None:
    write_entry(cache_key, packed_layers())
    words = [sys.executable, "-c", COMES_AND_GOES, str(packed_root() / "passes")]
    with ended_with_the_test(subprocess.Popen(words)) as other:
        found, deadline = Counter[str](), time.monotonic() + 120
        while len(found) < 2 and time.monotonic() < deadline:
            for _ in range(300):
                found.update(item.name for item in read_cache())
        other.kill()
    assert found.keys() == {"passes", next(packed_root().glob("AMXBF16*")).name}


def test_a_full_disk_is_named_and_leaves_no_entry(cache_key: CacheKey, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if in_small_disk(disk, "true").returncode:
        pytest.skip("this user may not mount a file system")
    show = f"KT_LAUNCH_CACHE='{disk}/c' \"$0\" \"$@\"; ls '{disk}/c/packed'"
    words = ["sh", "-c", show, sys.executable, "-c", textwrap.dedent(WRITER), str(cache_key.weight_path)]
    done = in_small_disk(disk, *words)
    assert "DiskError" in done.stderr
    assert "the disk is full" in done.stderr
    assert [line for line in done.stdout.splitlines() if "AMXBF16" in line and not line.endswith(".partial")] == []


def test_action_cache_lists_sizes_and_prunes_by_age_and_size(cache_key: CacheKey, launch: Launch, cache: Path) -> None:
    assert launch("action=cache").out == f"nothing in {cache}\n"
    entries = [write_entry(replace(cache_key, layout=f"layout {n}"), packed_layers(n)) for n in range(3)]
    for days, entry in zip((40, 20, 1), entries, strict=True):
        then = time.time() - days * 86400
        os.utime(entry.path / "manifest.json", (then, then))
    listed = json.loads(launch("action=cache", "format=json").out)
    assert {(item["kind"], item["state"]) for item in listed} == {("packed", "whole")}
    assert [item["bytes"] > 170_000 for item in listed] == [True] * 3
    assert launch("action=cache", "cache.do=verify").out.count("intact: ") == 3
    before = snapshot(cache)
    assert launch("action=cache", "cache.do=prune").out.startswith("freed 0.00 MiB")
    assert snapshot(cache) == before
    by_age = launch("action=cache", "cache.do=prune", "cache.days=30").out
    assert f"removed: {entries[0].path}" in by_age
    assert by_age.count("removed: ") == 1
    by_size = launch("action=cache", "cache.do=prune", "cache.max_gib=0.0002").out
    assert f"removed: {entries[1].path}" in by_size
    assert [path.name for path in packed_root().iterdir() if path.is_dir()] == [entries[2].path.name]


def test_quantized_experts_in_the_cache_are_listed_and_verified_too(launch: Launch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    assert launch("action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8").code == 0
    (listed,) = json.loads(launch("action=cache", "format=json").out)
    assert (listed["kind"], listed["state"]) == ("quantized", "whole")
    assert launch("action=cache", "cache.do=prune", "cache.days=0", "cache.max_gib=0").out.startswith("freed 0.00 MiB")
    damage_content(Path(listed["path"]))
    failed = launch("action=cache", "cache.do=verify")
    assert failed.code == 2
    assert "layer-00002.safetensors: has SHA-256" in failed.err


def test_limits_belong_to_prune(launch: Launch) -> None:
    done = launch("action=cache", "cache.days=3")
    assert (done.code, done.errors) == (2, ["cache.days: cache.do=list removes nothing. Set cache.do=prune."])


def test_the_plan_shows_the_entry_and_whether_it_is_there(cache_key: CacheKey, launch: Launch, cache: Path) -> None:
    import kt_kernels

    def entry(*words: str) -> dict[str, object]:
        typed = ("action=plan", "format=json", "model=auto", "server=cpu", "lora=none", "kt.cpuinfer=1")
        done = launch(*typed, f"model.path={cache_key.weight_path}", *words)
        assert done.code == 0, done.err
        plan = json.loads(done.out)
        found: dict[str, object] = plan["resolved"].get("kt.packed_entry", {})
        return found | {"env": plan["env"].get("KT_LAUNCH_PACKED_CACHE"), "warnings": str(plan["warnings"])}

    assert entry()["value"] is None
    hash_weights(cache_key)
    layout = kt_kernels.packed_layout(method="AMXBF16_SFT", pool=kt_kernels.ThreadPool(1, nodes=1))
    here = replace(cache_key, layout=layout)
    before = entry()
    assert str(before["source"]) == "probed: does not exist yet, written during the next start"
    made = write_entry(here, packed_layers())
    after = entry()
    assert before["value"] == after["value"] == str(made.path)
    assert "there, 0.00 GiB, mapped at the start" in str(after["source"])
    damage_content(made.path)
    cut_short(made.path)
    assert "unsound (is missing or not the" in str(entry()["source"])
    off = entry("kt.packed_cache=off")
    assert "value" not in off
    assert off["env"] == "off"
    assert after["env"] is None
    shutil.rmtree(cache / "packed")
    (cache / "packed").write_text("a file")
    assert "kt.packed_cache: " in str(entry()["warnings"])


def test_the_plan_tells_a_disk_that_is_too_full(
    cache_key: CacheKey, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's own answer is replaced: nobody's disk is full on demand."""
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    done = launch("action=plan", "model=auto", "server=cpu", "lora=none", f"model.path={cache_key.weight_path}")
    assert "packed is too full (0.00 GiB are needed, 0.00 GiB are free)" in done.out
