"""What SGLang's answers lack for OpenAI's clients: one id for all parts of a stream, and metadata that are texts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from kt_sglang.edge.scoring import NO_TOKEN, without_leftovers

ONE_ID = "kt_one_id"
"""Attribute of SGLang's request: its answers are one answer of OpenAI's, with several choices."""


def told(request: Any, answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """`answers`, with what their route needs of them."""
    answers = without_leftovers(answers) if NO_TOKEN.get() else answers
    return _with_one_id(answers) if getattr(request, ONE_ID, False) else answers


async def _with_one_id(answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Trigger: a stream of several answers. SGLang gives each its own id; OpenAI's chunks of a stream have one. Safe
    because the id is only shown. Remove when SGLang has one."""
    first = None
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        async for part in answers:
            meta = part["meta_info"]
            first = meta["id"] if first is None else first
            yield {**part, "meta_info": {**meta, "id": first}}


def after_build_metadata(found: dict[str, Any], *_: Any) -> dict[str, Any]:
    """AFTER hook of `build_endpoint_weight_version_metadata`: OpenAI's metadata are texts.

    Trigger: every answer. SGLang adds a list of versions, of which OpenAI's client warns. Safe because weights of a
    server do not change (blocked_routes.py). Remove when SGLang leaves it out.
    """
    return {name: value for name, value in found.items() if isinstance(value, str)}
