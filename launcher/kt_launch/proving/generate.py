"""Requests of the proof to SGLang's own /generate: greedy tokens, computed without a cached prefix."""

from __future__ import annotations

from typing import Any

import httpx

from kt_model.errors import ProofFailed


def generate(client: httpx.Client, tokens: int = 1, **fields: Any) -> Any:
    """The answer to a request with these fields, without those that are None; one for each prompt, or a single one for
    a single prompt. Raises httpx.HTTPError, and ProofFailed if the server refuses the request."""
    answer = post(client, tokens, **fields)
    if answer.is_error:
        raise ProofFailed("proof", f"/generate answered {answer.status_code}: {answer.text[:300]}")
    return answer.json()


def post(client: httpx.Client, tokens: int = 1, **fields: Any) -> httpx.Response:
    """The same, whether or not the server refuses it."""
    client.post("/flush_cache")
    sampling = {"max_new_tokens": tokens, "temperature": 0.0, **fields.pop("sampling_params", {})}
    body = {"sampling_params": sampling, **fields}
    return client.post("/generate", json={name: value for name, value in body.items() if value is not None})
