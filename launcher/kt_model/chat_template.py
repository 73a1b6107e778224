"""The chat template in a folder of a model or an adapter, as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

from kt_model.atomic_file import read_regular
from kt_model.jsonfile import read_json_or_empty

FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
"""The file goes before the key of tokenizer_config.json."""
FLAG = "--chat-template"
"""SGLang's flag for another one than the model's."""


def read_chat_template(folder: Path) -> str:
    """Its text, of several named ones as JSON; empty if there is none."""
    try:
        return read_regular(folder / FILE).decode(errors="replace").strip()
    except (OSError, ValueError):
        found = read_json_or_empty(folder / TOKENIZER_CONFIG).get("chat_template") or ""
        return found.strip() if isinstance(found, str) else json.dumps(found)
