"""What must be the same on all hosts that serve one model: versions, weights, adapters, and SGLang's arguments."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Digests
from kt_model.experts import ExpertSource, fingerprint
from kt_model.installed import versions
from kt_model.plan import LaunchPlan
from kt_model.tensors.folder import weight_files
from kt_model.weights.folder import MANIFEST

OWN_FLAGS = frozenset(
    (
        *("--model-path", "--kt-weight-path", "--lora-paths", "--node-rank", "--host", "--port"),
        *("--kt-cpuinfer", "--kt-threadpool-count", "--device"),
    )
)
"""Arguments that may differ between hosts: where files are, how many cores there are."""
UNKNOWN = "not read yet"


def facts_of(plan: LaunchPlan) -> dict[str, str]:
    """The facts to compare, by a readable name. Reads no weights except adapters: digests of the checkpoint's files are
    included if they are cached, and a fingerprint of its headers and experts always."""
    packages = {name: version for name, version in versions().items() if name != "Python"}
    return {**packages, **_arguments(plan.argv[1:]), **_files(plan)}


def differences(here: Mapping[str, str], there: Mapping[str, str], name: str) -> list[str]:
    """One sentence per fact that differs. name: of the other host."""
    return [
        f"{fact} is {there.get(fact, 'not set')} on {name}, but {here.get(fact, 'not set')} here"
        for fact in [*here, *(fact for fact in there if fact not in here)]
        if here.get(fact) != there.get(fact) and UNKNOWN not in (here.get(fact), there.get(fact))
    ]


def _arguments(words: Sequence[str]) -> dict[str, str]:
    """Flag -> its values."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        elif flag:
            found[flag].append(word)
    names = {"--lora-paths names": [value.partition("=")[0] for value in found.get("--lora-paths", [])]}
    own = {flag: values for flag, values in found.items() if flag not in OWN_FLAGS}
    return {flag: " ".join(values) or "set" for flag, values in (own | names).items()}


def _files(plan: LaunchPlan) -> dict[str, str]:
    model, weights = Path(plan.value("model.path")), Path(plan.value("kt.weight_path"))
    base = read_checkpoint(model, "model.path")
    found = {"the checkpoint's fingerprint": fingerprint(ExpertSource(base))[:12]}
    with Digests() as digests:
        known = [digests.known(file) for file in weight_files(model)]
        found["the checkpoint's digest"] = UNKNOWN if None in known else _together(map(str, known))
        if weights != model:
            found["the quantized experts"] = digests.sha256(weights / MANIFEST)[:12]
        for name, folder in plan.adapters.items():
            files = sorted(itertools.chain(Path(folder).glob("adapter_*"), Path(folder).glob("*.safetensors")))
            sums = (f"{file.name} {digests.sha256(file)}" for file in dict.fromkeys(files) if file.suffix != ".bin")
            found[f"adapter {name}"] = _together(sums)
    return found


def _together(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
