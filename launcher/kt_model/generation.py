"""What a checkpoint's folder says of its answers beside the weights: sampling and ends in generation_config.json, and
the names of the tokenizer's chat templates. What a server makes of it is in kt_sglang/edge and
kt_sglang/sampling/ends.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_model.chat_template import FILE as TEMPLATE_FILE
from kt_model.chat_template import TOKENIZER_CONFIG
from kt_model.jsonfile import read_json, read_json_or_empty

FILE, EOS, DO_SAMPLE = "generation_config.json", "eos_token_id", "do_sample"
DEFAULT_TEMPLATE, MORE_TEMPLATES = "default", "additional_chat_templates"
FAR = float(2**30)
BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, FAR), "top_k": (-1.0, FAR), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}  # fmt: skip
"""What SGLang samples by, and the least and largest value that it takes."""
PASSED_OVER: Mapping[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": ({}, []), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (), "num_beams": (1,), "penalty_alpha": (0,),
    "guidance_scale": (1,), "stop_strings": ([], ""), "exponential_decay_length_penalty": (), "min_length": (0,),
    "min_new_tokens": (0,),
}  # fmt: skip
"""What transformers' generate() obeys and SGLang does not take from there, and the values that ask for nothing."""


@dataclass(frozen=True)
class Generation:
    """The facts of one folder."""

    sampling: Mapping[str, float] = field(default_factory=dict)
    """Parameters of requests that name none."""
    greedy: bool = False
    """Whether answers are not to be sampled."""
    unsound: tuple[str, ...] = ()
    """Values that SGLang would refuse in every request."""
    passed_over: tuple[str, ...] = ()
    other_ends: tuple[int, ...] = ()
    """Ends that only config.json names."""
    templates: tuple[str, ...] = ()
    """Names of chat templates, if there are several."""

    @property
    def shown(self) -> str:
        """The sampling, in words."""
        given = {name: value for name, value in self.sampling.items() if not (self.greedy and name == "temperature")}
        first = ["temperature 0"] if self.greedy else [] if "temperature" in given else ["temperature 1"]
        return ", ".join([*first, *(f"{name} {value:g}" for name, value in given.items())])


def read_generation(folder: Path, config: Mapping[str, Any]) -> Generation:
    """config: config.json. Raises LaunchError if generation_config.json is there and cannot be read; SGLang would go
    without it, in silence."""
    there = (folder / FILE).exists()
    said = read_json(folder / FILE, "model.path") if there else {}
    values = {name: said[name] for name in BOUNDS if said.get(name) is not None}
    unsound = tuple(f"{name} {value!r}" for name, value in values.items() if not _is_sound(name, value))
    ends = ids_of(said.get(EOS))
    return Generation(
        sampling={} if unsound else values,
        greedy=said.get(DO_SAMPLE) is False,
        unsound=unsound,
        passed_over=tuple(_passed_over(said)),
        other_ends=tuple(sorted(ids_of(config.get(EOS)) - ends)) if ends else (),
        templates=_template_names(folder),
    )


def _is_sound(name: str, value: Any) -> bool:
    low, high = BOUNDS[name]
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _passed_over(said: Mapping[str, Any]) -> Iterator[str]:
    for name, neutral in PASSED_OVER.items():
        if said.get(name) is not None and said[name] not in neutral:
            yield name


def ids_of(value: Any) -> set[int]:
    """Tokens: of a single one, a list, or null."""
    return {each for each in (value if isinstance(value, list) else [value]) if type(each) is int}


def _template_names(folder: Path) -> tuple[str, ...]:
    """As transformers finds them: the files go before the key, which may be a list of named ones."""
    alone = (DEFAULT_TEMPLATE,) if (folder / TEMPLATE_FILE).exists() else ()
    more = tuple(sorted(file.stem for file in (folder / MORE_TEMPLATES).glob("*.jinja")))
    if alone or more:
        return (*alone, *more) if more else ()
    found = read_json_or_empty(folder / TOKENIZER_CONFIG).get("chat_template")
    rows = found if isinstance(found, list) else []
    return tuple(str(row["name"]) for row in rows if isinstance(row, dict) and "name" in row)
