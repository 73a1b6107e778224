"""Which folders a running server loads adapters from: as paths, without a server. What a server answers is shown by
test_loading.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_model.adapter_siblings import siblings_folder
from kt_model.errors import LaunchError
from kt_model.importer.admission import require_allowed

FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"{}")
    return folder


def write_cached(hub: Path) -> Path:
    """A snapshot as the Hugging Face cache has it."""
    repository = hub / "models--a--west"
    blobs, snapshot = write(repository / "blobs"), repository / "snapshots" / "0f3e"
    snapshot.mkdir(parents=True)
    for name in FILES:
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert blobs.is_dir()
    return snapshot


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def refusal(typed: Path, *allowed: Path) -> str:
    with pytest.raises(LaunchError) as refused:
        require_allowed(typed, allowed)
    return str(refused.value)


def test_a_folder_below_an_allowed_one_is_taken_without_links(top: Path) -> None:
    west = write(top / "deep" / "west")
    (top / "latest").symlink_to("deep/west")
    (west / "notes").symlink_to("/etc/hostname")  # is not read
    assert require_allowed(west, [top]) == require_allowed(top / "latest", [top]) == west
    assert require_allowed(west, [west]) == west


def test_an_allowed_folder_may_be_a_link_itself(top: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(top)
    west = write(top / "west")
    assert require_allowed(tmp_path / "link" / "west", [tmp_path / "link"]) == west
    assert require_allowed(west, [tmp_path / "link"]) == west


def test_a_training_run_stands_for_its_newest_checkpoint_if_that_lies_there_too(top: Path, tmp_path: Path) -> None:
    write(top / "run" / "checkpoint-5")
    newest = write(top / "run" / "checkpoint-20")
    assert require_allowed(top / "run", [top]) == newest
    (top / "run" / "checkpoint-30").symlink_to(write(tmp_path / "elsewhere"))
    assert "which is in no folder that this server loads adapters from" in refusal(top / "run", top)


def test_what_lies_elsewhere_is_refused_with_what_to_do(top: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other" / "west")
    said = f"lora_path: {other} is in no folder that this server loads adapters from ({top}). Move it into one of "
    assert refusal(other, top) == f"{said}them, or start the server with lora.allow=[{top},{other.parent}]."
    assert refusal(top / ".." / "other" / "west", top).startswith(f"lora_path: {top}/../other/west is in no folder")
    assert refusal(other) == (
        f"lora_path: {other} is in no folder that this server loads adapters from (lora.allow is empty). "
        f"Start the server with lora.allow=[{other.parent}]."
    )


def test_where_a_link_elsewhere_leads_is_not_told(top: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "west").symlink_to(tmp_path / "secret")
    assert "secret" not in refusal(tmp_path / "west", top)
    assert refusal(tmp_path / "gone", top).replace("gone", "west") == refusal(tmp_path / "west", top)


@pytest.mark.parametrize("name", [*FILES, "adapter_model.safetensors.index.json", "fused_expert_lora.safetensors"])
def test_a_file_that_is_a_link_out_is_refused(name: str, top: Path, tmp_path: Path) -> None:
    other, west = write(tmp_path / "other"), write(top / "west")
    (west / name).unlink(missing_ok=True)
    (west / name).symlink_to(other / FILES[0])
    said = refusal(west, top)
    assert said.startswith(f"lora_path: {west / name} is a link to {other / FILES[0]}, which is in no folder that ")
    assert said.endswith(f"Copy the file into {west}.")


def test_a_shard_that_is_a_link_out_is_refused(top: Path, tmp_path: Path) -> None:
    west, shard = write(top / "west"), "adapter_model-00001-of-00001.safetensors"
    (west / FILES[1]).unlink()
    (west / "adapter_model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{shard}"}}}}')
    (west / shard).symlink_to(write(tmp_path / "other") / FILES[1])
    assert refusal(west, top).startswith(f"lora_path: {west / shard} is a link to ")


def test_a_snapshot_of_the_cache_may_link_to_its_own_repositorys_blobs(tmp_path: Path) -> None:
    snapshot = write_cached(tmp_path / "hub")
    repository = snapshot.parents[1]
    assert siblings_folder(snapshot) == repository
    for allowed in (snapshot, snapshot.parent, repository, tmp_path / "hub"):
        assert require_allowed(snapshot, [allowed]) == snapshot
    other = write_cached(tmp_path / "other-hub")
    (snapshot / FILES[1]).unlink()
    (snapshot / FILES[1]).symlink_to(other / FILES[1])
    assert f"{snapshot / FILES[1]} is a link to " in refusal(snapshot, tmp_path / "hub")
    (repository / "blobs").rename(repository / "moved")
    (repository / "blobs").symlink_to(tmp_path / "other-hub")
    assert "is a link to" in refusal(snapshot, tmp_path / "hub")


def test_the_usual_home_is_the_parent_but_never_the_root() -> None:
    assert siblings_folder(Path("/adapters/west")) == Path("/adapters")
    assert siblings_folder(Path("/west")) == Path("/west")
