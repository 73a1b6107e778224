"""Which adapters a running server accepts: from folders that its config allows, with ranks and modules within its
capacity. The server checks here when one is loaded, and kt-launch inspect beforehand, so that both say the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from kt_model.adapter_siblings import BLOBS, cache_repository, siblings_folder
from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError, LaunchErrors, errors_of
from kt_model.importer import kt_training
from kt_model.importer.facts import require_complete
from kt_model.importer.files import INDEX, WEIGHTS, iterate_files
from kt_model.importer.normal import Imported
from kt_model.importer.serving import FUSED_GROUPS, require_served, without
from kt_model.training import ADAPTER_CONFIG, adapter_folder

WHERE = "lora_path"
"""The request field that names an adapter's folder."""


def require_allowed(typed: str | Path, allowed: Sequence[Path]) -> Path:
    """The adapter's folder with links resolved; for a training run, its newest checkpoint's. Raise LaunchError if the
    folder or one of its files is outside of `allowed`, or a link leads out of it; nothing is read before that is
    checked."""
    if "\0" in str(typed):
        raise LaunchError(WHERE, "it holds a NUL byte, expected a folder", "Name the adapter's folder.")
    tops = [Path(os.path.realpath(top)) for top in allowed]
    folder = _require_inside(Path(typed), tops, allowed)
    folder = _require_inside(adapter_folder(folder), tops, allowed)
    repository = cache_repository(folder)
    own = [*tops, repository / BLOBS] if repository else tops
    for file in _files(folder, own, allowed):
        _require_file(file, own, allowed)
    return folder


def _require_inside(folder: Path, tops: Iterable[Path], allowed: Sequence[Path]) -> Path:
    real = Path(os.path.realpath(folder))
    if _lies_in(real, tops):
        return real
    plain = Path(os.path.normpath(folder.absolute()))
    if _lies_in(plain, [*tops, *allowed]):
        raise LaunchError(
            WHERE, f"{folder} is {real}, which is in no folder that {_allowed_text(allowed)}", _fix(real, allowed)
        )
    # A message must not reveal what is there, not even where links lead.
    problem = f"{folder} is in no folder that {_allowed_text(allowed)}"
    raise LaunchError(WHERE, problem, _fix(plain, allowed))


def _files(folder: Path, tops: Iterable[Path], allowed: Sequence[Path]) -> Iterator[Path]:
    """The files to read; the index comes first, since it names the others."""
    first = [folder / name for name in (ADAPTER_CONFIG, INDEX, WEIGHTS, kt_training.FILE)]
    yield from first
    yield from (file for file in iterate_files(folder) if file not in first)


def _require_file(file: Path, tops: Iterable[Path], allowed: Sequence[Path]) -> None:
    real = Path(os.path.realpath(file))
    if not _lies_in(real, tops):
        problem = f"{file} is a link to {real}, which is in no folder that {_allowed_text(allowed)}"
        raise LaunchError(WHERE, problem, f"Copy the file into {file.parent}.")


def _lies_in(real: Path, tops: Iterable[Path]) -> bool:
    return any(real.is_relative_to(top) for top in tops)


def _allowed_text(allowed: Sequence[Path]) -> str:
    names = ", ".join(map(str, allowed)) or "lora.allow is empty"
    return f"this server loads adapters from ({names})"


def _fix(folder: Path, allowed: Sequence[Path]) -> str:
    """The setting for the next start, including what is already allowed."""
    start = f"start the server with lora.allow=[{','.join(map(str, [*allowed, siblings_folder(folder)]))}]."
    return f"Move it into one of them, or {start}" if allowed else f"{start[:1].upper()}{start[1:]}"


def require_loadable(
    imported: Imported, base: Checkpoint, ignore: Sequence[str] = (), allow_missing: bool = False
) -> Imported:
    """The adapter without ignored parts. Raise LaunchError or LaunchErrors for what cannot be served."""
    imported.require_sound()
    if not allow_missing:
        require_complete(imported, base, WHERE)
    require_served(imported, base, ignore, WHERE)
    return without(imported, ignore)


def require_rank(rank: int, capacity: int | None, path: str) -> None:
    """Raise LaunchError for a rank above the server's limit. SGLang's own message names its flag and a rank that the
    user never typed, since PEFT may write twice the r of adapter_config.json."""
    if capacity is not None and rank > capacity:
        problem = f"{path} has rank {rank}, but this server accepts ranks up to {capacity}"
        raise LaunchError(WHERE, problem, f"Start it with lora.max_rank={rank} or larger.")


def require_modules(reached: Collection[str], kept: Collection[str], path: str) -> None:
    """Raise LaunchError for modules outside the server's capacity. kept: the modules it was started with, by PEFT's
    names."""
    capacity = {_fused(name) for name in kept}
    if missing := sorted(name for name in reached if _fused(name) not in capacity):
        problem = (
            f"{path} reaches {', '.join(missing)}, but this server accepts adapters only on {', '.join(sorted(kept))}"
        )
        raise LaunchError(WHERE, problem, f"Start it with lora.target_modules=[{','.join(sorted({*kept, *missing}))}].")


def _fused(name: str) -> str:
    """SGLang reserves a fused group as a whole."""
    return next((group[0] for group in FUSED_GROUPS if name in group), name)


def message_of(failure: LaunchError | LaunchErrors) -> str:
    """All mistakes on one line, worded for a running server: keys are set at its next start."""
    lines = [re.sub(r"\bSet (lora\.)", r"Start the server with \1", str(error)) for error in errors_of(failure)]
    return " ".join(line if line.endswith(".") else f"{line}." for line in lines)
