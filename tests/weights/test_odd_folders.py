"""Folders that hold more, less or something else than their index says: every action reads what SGLang's own loader
reads, or all of them refuse the folder alike.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from odd_checkpoints import HARMLESS, INDEX, REFUSED, WHOLE, left_over_whole, split
from safetensors.torch import load_file
from tiny_checkpoints import adapter_folder, write_checkpoint
from weight_files import Ended

from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource, fingerprint

Launch = Callable[..., Ended]
ACTIONS = {"plan": (), "serve": (), "inspect": (), "quantize": ("kt=int8",), "merge": ()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it should be."""
    return write_checkpoint("deepseek_v2", tmp_path_factory.mktemp("sound") / "model")


def words_of(folder: Path, action: str, target: Path) -> list[str]:
    lora = f"lora.path={adapter_folder('deepseek_v2', 'experts_r4')}"
    place = {"merge": [f"merge.path={target}"], "quantize": [f"kt.weight_path={target}"]}.get(action, [])
    return [f"action={action}", "model=auto", f"model.path={folder}", lora, *ACTIONS[action], *place]


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_folder_is_the_checkpoint_that_it_was(
    name: str, sound: Path, launch: Launch, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    HARMLESS[name](folder)
    before, after = read_checkpoint(sound), read_checkpoint(folder)
    assert after.tensors.keys() == before.tensors.keys()
    assert after.other_bytes == before.other_bytes
    assert fingerprint(ExpertSource(after)) == fingerprint(ExpertSource(before))
    planned = launch(*words_of(folder, "plan", tmp_path))
    assert planned.code == 0, planned.err
    assert "--load-format safetensors --model-config-parser hf" in " ".join(planned.out.split())
    message = [line for line in planned.out.splitlines() if "model.path: not read" in line]
    assert bool(message) == bool(after.unread)
    assert all(file in message[0] for file in after.unread)
    assert launch(*words_of(folder, "merge", tmp_path / "a")).code == 0
    assert launch(*words_of(sound, "merge", tmp_path / "b")).code == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def assert_same_weights(one: Path, other: Path) -> None:
    found, expected = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (one, other)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", HARMLESS)
def test_sglangs_loader_reads_the_same(name: str, sound: Path, tmp_path: Path) -> None:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files, safetensors_weights_iterator

    folder = shutil.copytree(sound, tmp_path / "model")
    HARMLESS[name](folder)
    globbed = glob.glob(f"{folder}/*.safetensors")  # noqa: PTH207  # it passes hidden files over, as in SGLang
    files = filter_duplicate_safetensors_files(globbed, str(folder), INDEX)
    assert sorted(files) == [str(file) for file in read_checkpoint(folder).files]
    expected, found = load_file(sound / WHOLE), dict(safetensors_weights_iterator(files))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", REFUSED)
def test_two_checkpoints_in_one_are_refused_alike(name: str, sound: Path, launch: Launch, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    write, words = REFUSED[name]
    write(folder)
    for action in ACTIONS:
        ended = launch(*words_of(folder, action, tmp_path / "made"))
        assert ended.code == 2, f"{action}: {ended.out}"
        (line,) = ended.errors
        assert words in line, f"{action}: {line}"
        assert str(folder) in line
        assert not list(tmp_path.glob("made*")), action


def test_an_index_that_names_nothing(sound: Path, launch: Launch, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    (folder / INDEX).write_text('{"weight_map": {}}')
    (line,) = launch(*words_of(folder, "plan", tmp_path)).errors
    assert (
        line == f"model.path: {folder / INDEX} names no file. Get the index and the shards again from the same source."
    )


def test_left_over_files_are_not_hashed(sound: Path, tmp_path: Path) -> None:
    from kt_model.weights.packed import CacheKey

    folder = shutil.copytree(sound, tmp_path / "model")
    split(folder)
    (folder / "consolidated.safetensors").write_bytes(b"anything")
    hashed: list[str] = []
    CacheKey(folder, "bf16", "any").with_digests(lambda file: hashed.append(file.name) or "0")  # type: ignore[func-returns-value]
    assert hashed == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_server_reads_the_files_of_the_plan(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SGLang would find none too: it takes a folder's own name for a pattern."""
    from kt_sglang.checkpoint import reading
    from kt_sglang.checkpoint.reading import around_prepare_weights

    folder, other = shutil.copytree(sound, tmp_path / "model [v2]*"), tmp_path / "draft"
    left_over_whole(folder)
    monkeypatch.setattr(reading, "served_checkpoint", lambda: read_checkpoint(folder))
    files = [str(folder / "model-00001-of-00002.safetensors"), str(folder / "model-00002-of-00002.safetensors")]
    assert around_prepare_weights(None, None, str(folder), None, True, None) == (str(folder), files, True)  # type: ignore[arg-type]
    own = [(str(other), None, True, None), (str(folder), None, True, ["mtp/*.safetensors"])]
    for arguments in own:
        assert around_prepare_weights(lambda _, *passed: passed, None, *arguments) == arguments
