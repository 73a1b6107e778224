"""A plugin of SGLang's that is not ours, for tests of servers in which something is done otherwise."""

from __future__ import annotations

from pathlib import Path


def write_plugin(folder: Path, name: str, code: str) -> Path:
    """A folder for PYTHONPATH, with a distribution in it that SGLang finds; `code` defines register()."""
    described = folder / f"{name}-1.dist-info"
    described.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (described / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    return folder
