"""What has changed since the file given to --config was saved: versions, and the files of checkpoint and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from kt_launch.config.dump import FILE_VARIABLE, read_made_with
from kt_model.digests import Digests
from kt_model.installed import versions
from kt_model.plan import LaunchPlan

READ_BYTES = 1 << 24
"""Larger files are compared only if their digest is cached."""


def differences_since_saved(plan: LaunchPlan, environ: Mapping[str, str]) -> tuple[str, ...]:
    """One sentence per difference; none if no file was given, or one without digests. Raises LaunchError."""
    file = environ.get(FILE_VARIABLE)
    made_with = read_made_with(Path(file)) if file else {}
    today = versions()
    found = [
        f"--config: {name} {then} where it was made, {today.get(name, 'none')} here"
        for name, then in made_with.get("versions", {}).items()
        if today.get(name) != then
    ]
    return (*found, *_other_files(made_with.get("files", {}), plan))


def _other_files(files: Mapping[str, str], plan: LaunchPlan) -> Iterator[str]:
    folders = {name: Path(folder) for folder, name in plan.folder_names.items()}
    unread = 0
    with Digests() as digests:
        for name, digest in files.items():
            folder, _, base = name.rpartition("/")
            if folder not in folders:
                continue
            path = folders[folder] / base
            if not path.is_file():
                yield f"--config: {name} is not in {folders[folder]}"
                continue
            known = digests.known(path)
            if known is None and path.stat().st_size > READ_BYTES:
                unread += 1
            elif f"sha256:{known or digests.sha256(path)}" != digest:
                yield f"--config: {path} is not the {name} that it was made with (another SHA-256)"
    if unread:
        yield f"--config: {unread} large files were not compared, since nothing has read them here yet"
