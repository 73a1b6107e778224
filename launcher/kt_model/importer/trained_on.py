"""What an adapter's folder tells of the model that it was trained on, compared with the base: the model's name, and the
chat template and added tokens of the tokenizer that trainers save beside an adapter. Shapes are base_match.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kt_model.adapter_siblings import cache_repository
from kt_model.chat_template import FLAG, TOKENIZER_CONFIG, read_chat_template
from kt_model.checkpoint import Checkpoint
from kt_model.errors import shown
from kt_model.jsonfile import read_json_or_empty

PRECISION = frozenset({"bnb", "4bit", "8bit", "bf16", "fp16", "fp8", "int4", "int8", "unsloth", "hf", "dynamic"})
"""Parts of names that tell how a model was stored."""
GENERIC = frozenset({"model", "models", "base", "chat", "instruct", "moe", "merged", "final", "checkpoint", "output"})
"""Parts that many models' names have."""
NUMBER = re.compile(r"[0-9]{1,9}")
LONGEST = 120


def differences(folder: Path, config: Mapping[str, Any], base: Checkpoint) -> Iterator[str]:
    """A warning for each. config: adapter_config.json."""
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and _is_another(named, base):
        yield (
            f"adapter_config.json says that it was trained on {named[:LONGEST]}, but the model is {base.path}; "
            "equal shapes do not make equal weights"
        )
    yield from _other_words(folder, base.path)


def _other_words(folder: Path, base: Path) -> Iterator[str]:
    own, given = read_chat_template(folder), read_chat_template(base)
    if own and own != given:
        problem = f"its folder has another chat template than {base}" if given else f"{base} has no chat template"
        yield (
            f"{problem}, and chats are worded by the model's; if it was trained with its own, save that as a .jinja "
            f"file and set server.extra_args=[{FLAG},/path/to/file.jinja]"
        )
    tokens, known = _added_tokens(folder), _added_tokens(base)
    if known and (new := sorted(tokens.items() - known.items(), key=lambda item: item[1])):
        names = shown([text[:LONGEST] for text, _ in new])
        yield f"its tokenizer has tokens that the model's has not, or has under other numbers: {names}"


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> number; empty if tokenizer_config.json has none."""
    table = read_json_or_empty(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    if not isinstance(table, dict):
        return {}
    rows = [(number, row.get("content")) for number, row in table.items() if isinstance(row, dict)]
    return {text: int(number) for number, text in rows if isinstance(text, str) and NUMBER.fullmatch(number)}


def _is_another(named: str, base: Checkpoint) -> bool:
    """Whether the names tell two models apart: they have parts in common, so that they can be compared, and others
    not. A folder that has a name of its own (`mine`) tells nothing."""
    trained = _parts(_last(named))
    names = {_repository(base.path), _repository(base.path.resolve()), base.config.get("_name_or_path")}
    own = [_parts(_last(name)) for name in names if isinstance(name, str)]
    comparable = [parts for parts in own if any(_tells(part) for part in parts & trained)]
    return bool(comparable) and trained not in comparable


def _repository(folder: Path) -> str:
    """The folder's name; in the Hub's cache, the repository's."""
    repository = cache_repository(folder)
    return repository.name if repository else folder.name


def _last(name: str) -> str:
    """Of a path, a name on the Hub, or a folder in the Hub's cache (models--owner--name), the model's own name."""
    folders = [part for part in re.split(r"[\\/]", name) if part]
    cached = next((part for part in folders if part.startswith("models--")), None)
    return cached.rpartition("--")[2] if cached else folders[-1] if folders else ""


def _parts(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower())) - PRECISION


def _tells(part: str) -> bool:
    return len(part) > 1 and part not in GENERIC and not part.isdecimal()
