"""Where quantized experts are searched for and made if no folder is typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource, fingerprint
from kt_model.methods import method_of
from kt_model.user_paths import cache_root
from kt_model.weights.folder import MANIFEST, describe_folder, read_method

BESIDE = ("{name}-CPU-weight-INT{bits}", "{name}-CPU-weights-INT{bits}", "{name}-AMXINT{bits}", "{name}-CPU-weight")
"""Names of folders with CPU experts beside a checkpoint, as used by others; the Hub's name does not say the bits."""


@dataclass(frozen=True)
class Experts:
    """A folder of quantized experts, and why it was chosen."""

    path: Path
    source: str
    foreign: str = ""
    """Folders with such names beside the checkpoint that cannot be used."""


def weights_root() -> Path:
    return cache_root() / "weights"


def own_folder(source: ExpertSource, method: str) -> Path:
    """The folder of this checkpoint's experts in this method, below the cache."""
    return weights_root() / f"{source.base.path.name}-{method_of(method).sglang_name}-{fingerprint(source)[:16]}"


def choose_folder(source: ExpertSource, method: str, prepare: bool) -> Experts:
    """The folder if none is typed: ours in the cache, else ours beside the checkpoint, else the one to be made."""
    own, beside = own_folder(source, method), _beside(source.base.path, method)
    ours = next((folder for folder, what in beside.items() if not what), None)
    if ours and not own.exists():
        return Experts(ours, "derived: made by kt-launch quantize, next to the model; the cache has none")
    made = "kt.prepare makes it if it is missing" if prepare else "made by kt-launch quantize"
    before = f"; comes before {ours}, next to the model" if ours else ""
    foreign = "; ".join(f"{folder} {what}" for folder, what in beside.items() if what)
    return Experts(own, f"derived: {made}{before}", foreign)


def _beside(checkpoint: Path, method: str) -> Mapping[Path, str]:
    """Folders beside the checkpoint named as its experts would be -> what each is, if it is not ours."""
    found = {}
    for pattern in BESIDE:
        name = pattern.format(name=checkpoint.name, bits=method_of(method).bits)
        folder = checkpoint.parent / name
        if not folder.is_dir():
            continue
        if not (folder / MANIFEST).is_file():
            found[folder] = _describe(folder)
        elif "{bits}" in pattern or read_method(folder) == method_of(method).name:
            found[folder] = ""
    return found


def _describe(folder: Path) -> str:
    """This folder is not served in any case, so a broken file in it is no reason to fail."""
    try:
        return describe_folder(folder)
    except LaunchError as failure:
        return f"is not a folder of quantized experts ({failure.where}: {failure.problem})"
