"""Which tokens end an answer: those that generation_config.json names, and those of config.json itself.

Trigger: a config.json that names no `eos_token_id`. SGLang then takes the one that the model's class in transformers
has by default, beside those of generation_config.json: token 2 of DeepSeek-V2 and Mixtral, 1 of DeepSeek-V3, which may
be a quotation mark in the model's tokenizer. And a token 0 of generation_config.json counts for none. Safe because
transformers looks into generation_config.json alone if it names one. Remove once SGLang does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kt_model.checkpoint import CONFIG
from kt_model.generation import EOS, ids_of
from kt_model.jsonfile import read_json_or_empty


def after_get_hf_eos_token_id(found: set[int] | None, config: Any) -> set[int] | None:
    """AFTER hook of `ModelConfig._get_hf_eos_token_id`. A set that comes to nothing is left as it is."""
    named = ids_of(getattr(config.hf_generation_config, EOS, None))
    if not named:
        return found
    own = read_json_or_empty(Path(config.model_path) / CONFIG)
    return named | ids_of(own.get(EOS))
