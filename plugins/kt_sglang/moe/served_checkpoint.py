"""The facts of the checkpoint that this server runs, from its headers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.errors import LaunchError


@cache
def served_checkpoint() -> Checkpoint:
    """The checkpoint of SGLang's server arguments. Raises LaunchError if that is not a folder."""
    from sglang.srt.runtime_context import get_server_args

    path = Path(get_server_args().model_path)
    if not path.is_dir():
        raise LaunchError("--model-path", f"{path} is not a folder", "Download the checkpoint and name its folder.")
    return read_checkpoint(path)
