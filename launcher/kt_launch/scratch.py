"""The folder for a server's temporary files: SGLang leaves its sockets behind, so they lie where they go with it."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

LONGEST_SOCKET = 107
"""Characters that Linux takes for the path of a socket."""
SOCKET_NAME = "/tmpabcdefgh"


@contextlib.contextmanager
def scratch_environment() -> Iterator[Mapping[str, str]]:
    """Variables that bring a server's temporary files into a folder of its own, which is gone after the block.

    torch's compiled code stays where it always is, since the next start can use it. Where the system's folder has so
    long a path that sockets below a folder in it could not be made, nothing is changed.
    """
    with tempfile.TemporaryDirectory(prefix="kt-launch-", ignore_cleanup_errors=True) as folder:
        if len(folder + SOCKET_NAME) > LONGEST_SOCKET:
            yield {}
            return
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
        yield {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return str(os.getuid())
