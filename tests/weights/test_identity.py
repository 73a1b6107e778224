"""What a folder was made from is told by all bytes of it: one byte in each kind of place, with the file's time kept."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from weight_files import Ended, snapshot, write_checkpoint, write_float8

from kt_launch.gathering import facts
from kt_launch.runs.lock import warn_of_other_weights
from kt_model import digests
from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Digests
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource, fingerprint
from kt_model.plan import LaunchPlan
from kt_model.tensors.folder import Located
from kt_model.weights import identity
from kt_model.weights.identity import known_weights, read_weights
from kt_model.weights.merging import merge
from kt_model.weights.quantizing import quantize
from kt_model.weights.staging import STATE

Launch = Callable[..., Ended]
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
SCALE = "model.layers.1.mlp.experts.0.down_proj.weight_scale_inv"


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a clock that is trusted after a tick."""
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(cache))
    monkeypatch.setattr(digests, "SETTLED_NS", 20_000_000)


def source_of(checkpoint: Path) -> ExpertSource:
    return ExpertSource(read_checkpoint(checkpoint, float8=True))


def change(checkpoint: Path, name: str, *, keeps_mtime: bool) -> None:
    """One bit near a tensor's end, in place."""
    place: Located = source_of(checkpoint).located[name]
    before = place.file.path.stat()
    at = place.file.data_start + place.tensor.start + (place.tensor.end - place.tensor.start) * 7 // 8
    with place.file.path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if keeps_mtime:
        os.utime(place.file.path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(params=[False, True], ids=["a new time", "the time kept"])
def keeps_mtime(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make(kind: str, tmp_path: Path) -> Path:
    checkpoint = tmp_path / "m"
    if kind == "float8":
        write_float8(checkpoint)
    else:
        write_checkpoint(checkpoint, shards=2, moe_intermediate_size=128)
    time.sleep(0.05)
    return checkpoint


@pytest.mark.parametrize(
    ("kind", "name"),
    [("plain", EXPERT), ("float8", EXPERT), ("float8", SCALE)],
)
def test_experts_of_which_a_byte_changed_are_no_longer_there_already(
    kind: str, name: str, keeps_mtime: bool, tmp_path: Path
) -> None:
    checkpoint, target = make(kind, tmp_path), tmp_path / "q"
    before = fingerprint(source_of(checkpoint))
    assert quantize(source_of(checkpoint), "int8", target)
    assert not quantize(source_of(checkpoint), "int8", target)
    made = snapshot(target)
    change(checkpoint, name, keeps_mtime=keeps_mtime)
    assert fingerprint(source_of(checkpoint)) == before, "the change is none that a sample shows"
    with pytest.raises(LaunchError, match="was made from other weights than those of"):
        quantize(source_of(checkpoint), "int8", target)
    assert snapshot(target) == made
    assert quantize(source_of(checkpoint), "int8", tmp_path / "new")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", EXPERT])
def test_a_merge_of_which_a_byte_changed_is_no_longer_there_already(
    name: str, keeps_mtime: bool, tmp_path: Path
) -> None:
    checkpoint, target = make("plain", tmp_path), tmp_path / "out"
    assert merge(source_of(checkpoint), None, target)
    assert not merge(source_of(checkpoint), None, target)
    change(checkpoint, name, keeps_mtime=keeps_mtime)
    with pytest.raises(LaunchError, match="exists and was made from something else"):
        merge(source_of(checkpoint), None, target)


def test_a_merge_of_another_configuration_is_no_longer_there_already(tmp_path: Path) -> None:
    checkpoint, target = make("plain", tmp_path), tmp_path / "out"
    assert merge(source_of(checkpoint), None, target)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    with pytest.raises(LaunchError, match="exists and was made from something else"):
        merge(source_of(checkpoint), None, target)


def test_experts_do_not_depend_on_the_rest(tmp_path: Path) -> None:
    """Quantized experts of a model whose embedding was trained further serve that model."""
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    change(checkpoint, "model.embed_tokens.weight", keeps_mtime=False)
    assert not quantize(source_of(checkpoint), "int8", tmp_path / "q")


def test_a_resumed_quantize_makes_again_what_was_made_from_other_bytes(tmp_path: Path) -> None:
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    partial = (tmp_path / "q").rename(tmp_path / "q.partial")
    manifest = json.loads((partial / "manifest.json").read_text())
    (partial / "manifest.json").unlink()
    pieces = {name: facts for name, facts in manifest["shards"].items() if name != "layer-00001.safetensors"}
    (partial / STATE).write_text(json.dumps({"key": manifest["key"], "pieces": pieces}))
    times = {file.name: file.stat().st_mtime_ns for file in partial.glob("layer-*")}
    change(checkpoint, EXPERT, keeps_mtime=True)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    assert quantize(source_of(checkpoint), "int8", tmp_path / "anew")
    resumed, anew = snapshot(tmp_path / "q"), snapshot(tmp_path / "anew")
    assert resumed == anew
    kept = [name for name, at in times.items() if (tmp_path / "q" / name).stat().st_mtime_ns == at]
    assert kept == [
        name for name in sorted(times) if name not in ("layer-00001.safetensors", "layer-00002.safetensors")
    ]


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make("plain", tmp_path)
    source, read = source_of(checkpoint), ExpertSource.read

    def changing(self: ExpertSource, layer: int, expert: int) -> object:
        if (layer, expert) == (2, 3):
            change(checkpoint, EXPERT, keeps_mtime=True)
        return read(self, layer, expert)

    monkeypatch.setattr(ExpertSource, "read", changing)
    with pytest.raises(LaunchError, match="was changed while it was read"):
        quantize(source, "int8", tmp_path / "q")
    assert not (tmp_path / "q").exists()
    monkeypatch.undo()
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    assert quantize(source_of(checkpoint), "int8", tmp_path / "anew")
    assert snapshot(tmp_path / "q") == snapshot(tmp_path / "anew")


def test_what_passed_by_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a second quantize nor by a start."""
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    monkeypatch.setattr(identity, "_read_all", None)
    passed = known_weights(source_of(checkpoint))
    assert passed == json.loads((tmp_path / "q" / "manifest.json").read_text())["weights"]
    assert not quantize(source_of(checkpoint), "int8", tmp_path / "q")
    monkeypatch.undo()
    assert passed == read_weights(source_of(checkpoint))


def test_experts_of_a_checkpoint_that_changed_since_are_refused_by_a_plan_that_knows_and_by_every_start(
    keeps_mtime: bool, launch: Launch, tmp_path: Path
) -> None:
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    words = ["model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'q'}"]
    assert launch("action=plan", *words).code == 0
    change(checkpoint, EXPERT, keeps_mtime=keeps_mtime)
    time.sleep(0.05)
    assert launch("action=plan", *words).code == 0, "a plan reads no weights"
    for action in ("serve", "plan"):
        ended = launch(f"action={action}", *words)
        assert ended.code == 2
        assert f"{tmp_path / 'q'}: was made from other weights than those of {checkpoint}." in ended.err


def test_what_is_too_much_to_read_before_a_start_is_read_beside_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(facts, "READ_BEFORE_START_BYTES", 0)
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    words = ["model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'q'}"]
    plan = LaunchPlan.from_json(launch("action=plan", "format=json", *words).out)
    warn_of_other_weights(plan, threading.Event())
    assert capfd.readouterr().err == ""
    change(checkpoint, EXPERT, keeps_mtime=True)
    time.sleep(0.05)
    monkeypatch.setattr(facts, "STARTING", ("plan",))
    assert launch("action=plan", *words).code == 0, "it is not read before a start"
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(digests.Cancelled):
        warn_of_other_weights(plan, stopped)
    warn_of_other_weights(plan, threading.Event())
    assert f"warning: {tmp_path / 'q'}: was made from other weights than those of" in capfd.readouterr().err
    assert launch("action=plan", *words).code == 2, "the next start knows"


def test_a_folder_of_an_earlier_version_serves_but_is_not_there_already(launch: Launch, tmp_path: Path) -> None:
    checkpoint = make("plain", tmp_path)
    assert quantize(source_of(checkpoint), "int8", tmp_path / "q")
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    del manifest["weights"]
    (tmp_path / "q" / "manifest.json").write_text(json.dumps(manifest))
    words = ["model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'q'}"]
    assert launch("action=plan", *words).code == 0
    ended = launch("action=quantize", *words)
    assert ended.code == 2
    assert "made by an earlier version of kt-launch, which did not record all of what it was made from." in ended.err


@pytest.mark.parametrize("content", ["[]", "{", '{"KEY": 5}', '{"KEY": {"stamp": 1}}', '{"KEY": {"stamp": STAMP}}'])
def test_a_damaged_memory_of_digests_is_none(content: str, tmp_path: Path) -> None:
    (file := tmp_path / "weights").write_bytes(b"content")
    ((key, stamp),) = digests.stamps_of([file])
    memory = tmp_path / "digests.json"
    memory.write_text(content.replace("KEY", key).replace("STAMP", json.dumps(stamp)))
    with Digests(memory) as remembered:
        assert remembered.known(file) is None
        assert remembered.sha256(file) == digests.sha256_of(file)
