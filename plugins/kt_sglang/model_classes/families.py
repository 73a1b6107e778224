"""The classes of SGLang that serve the families of kt_model/families.py; a family that is not here is found later."""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = ("deepseek_v2", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")


def _classes(file: str) -> list[Any]:
    found = import_module(f"sglang.srt.models.{file}").EntryClass
    return found if isinstance(found, list) else [found]


EntryClass = [each for file in FILES for each in _classes(file)]
"""By this name SGLang's registry looks for them."""
