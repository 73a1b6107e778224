"""Why an answer ended, kept with SGLang's request for the protocols that tell it in words of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDED = "kt_ended"
"""Attribute of SGLang's request: the last meta_info of its answer."""


def note_end(request: Any, part: Any) -> None:
    """part: one part of an answer, as SGLang's tokenizer manager yields it."""
    if isinstance(part, dict) and (meta := part.get("meta_info", {})).get("finish_reason") is not None:
        setattr(request, ENDED, meta)


def end_of(request: Any) -> Mapping[str, Any]:
    """meta_info, {} if the answer has not ended."""
    found: Mapping[str, Any] = getattr(request, ENDED, {})
    return found
