"""SGLang's classes for the families of kt_model/families.py; SGLang finds those of other families later."""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = ("deepseek_v2", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")


def _classes(file: str) -> list[Any]:
    found = import_module(f"sglang.srt.models.{file}").EntryClass
    return found if isinstance(found, list) else [found]


EntryClass = [each for file in FILES for each in _classes(file)]
"""The name that SGLang's registry looks for."""
