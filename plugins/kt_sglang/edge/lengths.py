"""How much a request may bring: no prompt that cannot fit into the model's context, and not too many of them. Pure.

Trigger: SGLang makes tokens of all of it, in the loop that answers everybody, before it compares their number with the
context: 20 MB, or 100,000 prompts of a token, keep all others waiting for a minute, and a launcher takes the server for
a hung one. Safe because texts of so many characters to a token do not occur, and more prompts can come in another
request. Remove when SGLang refuses them first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kt_sglang.edge.requests import Refused

LONGEST_TOKEN = 16
"""Characters that a token of a text stands for on average, at most; it is 4 or 5 in English."""
ALWAYS = 1 << 18
"""Characters of a prompt that are never refused here, but by SGLang, which counts the tokens."""
MOST_TEXT = 1 << 22
"""Characters of all that one request brings besides a prompt."""
MOST_PROMPTS = 2048
"""Prompts of one request, answers to them (n), and tools."""
ONE_PROMPT = ("messages", "system", "tools")
"""Fields whose value becomes one prompt, or a part of it."""
ONE_OR_MANY = ("text", "prompt", "input", "input_ids", "query", "documents", "items", "instances")
"""Fields whose value is a prompt, or a list of them."""


def require_fitting(body: Mapping[str, Any], context_length: int) -> None:
    """Raise Refused for a prompt, or a whole request, that is too long for any model of this context length."""
    most = max(context_length * LONGEST_TOKEN, ALWAYS)
    for field in (*ONE_OR_MANY, "tools"):
        if isinstance(body.get(field), list) and _is_many(body[field]) and len(body[field]) > MOST_PROMPTS:
            problem = f"{field}: got {len(body[field])} of them, expected at most {MOST_PROMPTS} in one request"
            raise Refused(400, field, problem)
    for field, prompt in _prompts(body):
        if is_longer(prompt, most):
            problem = f"{field}: it has more than {most} characters, the model's context is {context_length} tokens"
            raise Refused(400, field, problem, "context_length_exceeded")
    if is_longer(body, most := most + MOST_TEXT):
        raise Refused(413, "", f"the request has more than {most} characters in its fields")


def is_longer(value: Any, most: int) -> bool:
    """Whether more characters are in it, at any depth; a number counts as one."""
    waiting, count = [value], 0
    while waiting and count <= most:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part
        else:
            count += len(part) if isinstance(part, str) else 1
    return count > most


def _prompts(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((field, body[field]) for field in ONE_PROMPT if field in body)
    for field in ONE_OR_MANY:
        value = body.get(field)
        yield from ((field, each) for each in (value if isinstance(value, list) and _is_many(value) else [value]))


def _is_many(value: list[Any]) -> bool:
    """Whether it has prompts; a list of numbers is one."""
    return any(isinstance(each, (str, list, dict)) for each in value[:1])
