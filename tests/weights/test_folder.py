"""Folders of quantized experts and checkpoints that are not right: named, exit 2, nothing written or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weight_files import Ended, snapshot, write_checkpoint, write_kt_kernel_folder

from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Digests
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource, fingerprint
from kt_model.weights.folder import read_folder, verify_hashes
from kt_model.weights.quantizing import quantize

Launch = Callable[..., Ended]
METHOD = "int8"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m", shards=2)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    quantize(ExpertSource(read_checkpoint(checkpoint)), METHOD, tmp_path / "q")
    return tmp_path / "q"


def refusal(launch: Launch, checkpoint: Path, folder: Path | None, action: str = "plan", method: str = METHOD) -> str:
    """What the command says; it must end with 2 and leave every file as it was."""
    before = snapshot(checkpoint), snapshot(folder) if folder else None
    given = [f"kt.weight_path={folder}"] if folder else []
    ended = launch(f"action={action}", "model=auto", f"model.path={checkpoint}", f"kt.method={method}", *given)
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert before == (snapshot(checkpoint), snapshot(folder) if folder else None)
    (line,) = ended.errors
    return line


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_method(launch: Launch, checkpoint: Path, folder: Path) -> None:
    line = refusal(launch, checkpoint, folder, method="int4")
    assert f"kt.weight_path: {folder} holds int8 experts, but kt.method is int4." in line


def test_another_base_by_its_shape(launch: Launch, folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", moe_intermediate_size=32)
    line = refusal(launch, other, folder)
    assert "was made for another base: 2 layers of 4 experts 96 x 64; " in line
    assert "has 2 layers of 4 experts 96 x 32." in line


def test_another_base_of_the_same_shape(launch: Launch, folder: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", shards=2, seed=9)
    assert f"{folder}: was made from other weights than those of {other}." in refusal(launch, other, folder)


def test_a_missing_folder(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    ended = launch(
        "action=plan", "model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'x'}"
    )
    command = f"kt-launch quantize model=auto model.path={checkpoint} kt=int8 kt.weight_path={tmp_path / 'x'}"
    assert ended.errors == [
        f"kt.method: int8 needs kt.weight_path (no folder {tmp_path / 'x'}). Run {command}, or add kt.prepare=true."
    ]


def test_a_missing_shard(launch: Launch, checkpoint: Path, folder: Path) -> None:
    (folder / "layer-00002.safetensors").unlink()
    assert "layer-00002.safetensors: is missing, but the manifest lists it." in refusal(launch, checkpoint, folder)


def test_a_truncated_shard(launch: Launch, checkpoint: Path, folder: Path) -> None:
    shard = folder / "layer-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"is {shard.stat().st_size} bytes, but the manifest says" in refusal(launch, checkpoint, folder)


def test_a_wrong_hash(launch: Launch, checkpoint: Path, folder: Path) -> None:
    shard = folder / "layer-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    line = refusal(launch, checkpoint, folder, action="serve")
    assert f"{shard}: has SHA-256 " in line
    assert "but the manifest says" in line


def test_hashes_that_are_right(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    read = read_folder(folder, METHOD, read_checkpoint(checkpoint))
    with Digests(tmp_path / "digests.json") as digests:
        verify_hashes(read, digests.sha256)
        assert digests.bytes_read == read.bytes


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"version": 2}, "version: is 2"),
        ({"format": "something"}, "format: is 'something'"),
        ({"shards": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}, "String should match pattern"),
        (
            {"shards": {"layer-00001.safetensors": {"bytes": "many", "sha256": ""}}},
            "shards.layer-00001.safetensors.bytes: Input should be a valid integer",
        ),
        ({"shards": []}, "shards: Input should be an object"),
        ({"model": {}}, "model.experts: Field required"),
        ({"key": None}, "key: Input should be an object"),
    ],
)
def test_a_manifest_that_says_something_else(
    changes: dict[str, Any], mistake: str, launch: Launch, checkpoint: Path, folder: Path
) -> None:
    change_manifest(folder, **changes)
    line = refusal(launch, checkpoint, folder)
    assert f"{folder / 'manifest.json'}: is of another format, expected kt-launch experts version 1 (" in line
    assert mistake in line
    assert "Run kt-launch quantize" in line


def test_a_manifest_that_is_no_json(launch: Launch, checkpoint: Path, folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "manifest.json: is not a manifest of quantized experts." in refusal(launch, checkpoint, folder)


def test_a_folder_packed_by_kt_kernel_is_named(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    other = write_kt_kernel_folder(tmp_path / "kt")
    line = refusal(launch, checkpoint, other)
    assert f"kt.weight_path: {other} was packed by kt-kernel for its own tiles and 2 NUMA pools, which no" in line
    message = line.partition("Leave kt.weight_path out, and run ")[2].removesuffix(" first.")
    assert message == f"kt-launch quantize model=auto model.path={checkpoint} kt.method={METHOD}"
    assert launch(*message.split()[1:]).code == 0
    served = launch("action=plan", "model=auto", f"model.path={checkpoint}", f"kt.method={METHOD}")
    assert served.code == 0, served.err


def test_a_folder_that_was_not_finished(launch: Launch, checkpoint: Path, folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert "has no manifest.json: it is not a folder of quantized experts, or an incomplete one." in refusal(
        launch, checkpoint, folder
    )


def first_shard(checkpoint: Path) -> Path:
    return checkpoint / "model-00001-of-00002.safetensors"


def test_a_truncated_shard_of_the_checkpoint(launch: Launch, checkpoint: Path) -> None:
    shard = first_shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard}: truncated: " in refusal(launch, checkpoint, None, "quantize")


def test_a_shard_that_is_a_pickle(launch: Launch, checkpoint: Path) -> None:
    import torch

    torch.save({"x": torch.zeros(2)}, first_shard(checkpoint))
    line = refusal(launch, checkpoint, None, "quantize")
    assert f"{first_shard(checkpoint)}: a torch pickle (zip archive), but a safetensors file is expected." in line


def test_a_header_of_absurd_size(launch: Launch, checkpoint: Path) -> None:
    first_shard(checkpoint).write_bytes((1 << 62).to_bytes(8, "little") + b"{" * 100)
    assert f"its header would be {1 << 62} bytes" in refusal(launch, checkpoint, None, "quantize")


def test_an_index_that_names_a_missing_shard(launch: Launch, checkpoint: Path) -> None:
    first_shard(checkpoint).unlink()
    line = refusal(launch, checkpoint, None, "quantize")
    assert "model-00001-of-00002.safetensors" in line
    assert "missing" in line


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "sub/x.safetensors", ""])
def test_an_index_that_leaves_the_folder(name: str, checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    tensor = next(iter(content["weight_map"]))
    content["weight_map"][tensor] = name
    (checkpoint.parent / "outside.safetensors").write_bytes(first_shard(checkpoint).read_bytes())
    index.write_text(json.dumps(content))
    from kt_model.tensors.folder import locate_tensors

    with pytest.raises(LaunchError, match="outside of the folder"):
        locate_tensors(checkpoint)


def test_an_index_that_leaves_the_folder_ends_the_command(launch: Launch, checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "../../../etc/passwd"
    index.write_text(json.dumps(content))
    assert "passwd" in refusal(launch, checkpoint, None, "quantize")


@pytest.mark.parametrize("action", ["plan", "quantize", "serve"])
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"model.extra.weight": "/etc/hostname"}}',
            "model.extra.weight is in '/etc/hostname', outside",
        ),
        ('{"weight_map": ["a"]}', "model.safetensors.index.json is not an object of names"),
        ('{"weight_map": {"a": [1]}}', "model.safetensors.index.json is not an object of names"),
        ("{}", "model.safetensors.index.json is not an object of names"),
        ("[1]", "model.safetensors.index.json holds no JSON object"),
        ("[" * 100_000, "model.safetensors.index.json is not readable JSON"),
    ],
)
def test_an_index_that_cannot_be_right(action: str, index: str, message: str, launch: Launch, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    line = refusal(launch, checkpoint, None, action)
    assert line.startswith("model.path: ")
    assert message in line


def test_a_loop_of_symlinks(launch: Launch, checkpoint: Path) -> None:
    shard = first_shard(checkpoint)
    shard.unlink()
    shard.symlink_to(shard.name)
    ended = launch("action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8")
    assert ended.code == 2
    assert str(shard) in ended.err
    assert "Traceback" not in ended.err


def test_a_symlink_into_a_hub_cache_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    shard, blob = first_shard(checkpoint), tmp_path / "blob"
    before = fingerprint(ExpertSource(read_checkpoint(checkpoint)))
    shard.rename(blob)
    shard.symlink_to(blob)
    assert fingerprint(ExpertSource(read_checkpoint(checkpoint))) == before


def test_a_folder_that_may_not_be_written(launch: Launch, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["quantize", "model=auto", f"model.path={checkpoint}", "kt=int8"]
    (line,) = launch(*words, "kt.weight_path=/proc/none").errors
    assert line.startswith("/proc/none: cannot be written (") and line.endswith("Choose a folder that you can write.")
    monkeypatch.setenv("KT_LAUNCH_CACHE", "/proc/cache")
    (line,) = launch(*words).errors
    assert line.startswith("/proc/cache/weights/")
    assert line.endswith("Set KT_LAUNCH_CACHE to a folder that you can write.")
