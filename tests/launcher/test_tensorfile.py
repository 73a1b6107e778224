"""Every way in which a file is not the safetensors file it is said to be."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kt_model.errors import LaunchError
from kt_model.tensors.header import read_header


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), start: int = 0, end: int = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_sound_file_is_read_as_its_writer_meant(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": np.zeros((3, 4), np.float16), "y": np.zeros((), np.int64)}, file, metadata={"format": "pt"})
    header = read_header(file)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()} == {
        "x": ("F16", (3, 4)),
        "y": ("I64", ()),
    }
    assert header.metadata == {"format": "pt"}
    assert header.data_start + 3 * 4 * 2 + 8 == file.stat().st_size


BROKEN = {
    "header that is no JSON": (b"{nonsense", b"", "broken header: no JSON"),
    "header that is a list": (b"[1]", b"", "its header is no JSON object"),
    "name twice": (b'{"x": {}, "x": {}}', b"", "a name appears in it twice"),
    "entry without shape": ({"x": {"dtype": "F32"}}, b"", "the entry of x"),
    "negative size": ({"x": entry(shape=(-2,))}, bytes(8), "sizes of x"),
    "boolean size": ({"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, bytes(8), "sizes of x"),
    "unknown dtype": ({"x": entry("Q9")}, bytes(8), "unknown dtype Q9"),
    "shape against bytes": ({"x": entry(shape=(3,))}, bytes(8), "of shape [3] and dtype F32 has 8 bytes"),
    "hole": ({"x": entry(), "y": entry(start=12, end=20)}, bytes(20), "y starts at byte 12, 8 is expected"),
    "overlap": ({"x": entry(), "y": entry(start=4, end=12)}, bytes(12), "y starts at byte 4, 8 is expected"),
    "truncated data": ({"x": entry()}, bytes(7), "truncated: 7 bytes of tensors, 8 are expected"),
    "data after the end": ({"x": entry()}, bytes(9), "1 bytes too long"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_what_is_broken(kind: str, tmp_path: Path) -> None:
    header, data, said = BROKEN[kind]
    file = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(LaunchError) as caught:
        read_header(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_torch_pickle_is_named_whatever_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(LaunchError, match="a torch pickle"):
        read_header(file)


def test_a_bare_pickle_is_named_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    file = tmp_path / "a.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(LaunchError, match="a Python pickle"):
        read_header(file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("length", [1 << 62, 200_000_000])
def test_an_absurd_header_size_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(LaunchError, match=f"its header would be {length} bytes"):
        read_header(file)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(LaunchError, match="truncated: its header is 1000 bytes, the whole file 10"):
        read_header(file)


def test_a_file_too_short_for_anything(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"abc")
    with pytest.raises(LaunchError, match="3 bytes long"):
        read_header(file)


@given(content=st.binary(max_size=200), length=st.integers(0, 300))
def test_no_bytes_at_all_make_it_fail_in_another_way(
    content: bytes, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / "a.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + content)
    try:
        header = read_header(file)
    except LaunchError as refused:
        assert str(file) in str(refused)
    else:
        assert header.data_start == 8 + length


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x10480])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(length: int, tmp_path: Path) -> None:
    """The first bytes of one file in 2048; of a checkpoint of 160 shards, one is likely enough to be among them."""
    text = json.dumps({"x": entry()}).encode().ljust(length)
    file = write(tmp_path / "a.safetensors", text, bytes(8))
    assert file.read_bytes()[:1] == pickle.PROTO
    assert set(read_header(file).tensors) == {"x"}
