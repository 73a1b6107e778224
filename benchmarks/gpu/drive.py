"""Drives a running server: the median time between tokens at 1, 4, 16 and 64 requests, and prefill of several lengths.

drive.py URL MODELS…: each of MODELS is a name, or several joined by + that the requests of one batch take in turn.
In each of ROUNDS passes (2), all MODELS have their turn, so that a machine's slow minute falls on all of them alike. A
JSON line a number of requests and MODELS: the median of its passes, and each of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count, pairwise
from typing import Any, NamedTuple

import httpx

BATCHES = {1: 32, 4: 20, 16: 12, 64: 10}
"""Requests at once → tokens of each."""
PREFILLS = tuple(map(int, os.environ.get("PREFILLS", "512 2048 8192").split()))
TEMPERATURE = float(os.environ.get("TEMPERATURE", "0"))
"""0: each model goes its own way, some into circles of few tokens. 1: with random weights, any token is as likely."""
ROUNDS = int(os.environ.get("ROUNDS", "2"))
PROMPT = 32
FIRST_TOKENS = count(1000)
"""No two prompts begin alike: SGLang keeps what it has read, and with Triton's latent attention 8,191 tokens after one
that was kept take 250 ms more than 8,192 by themselves."""
Figures = dict[str, float]


async def arrivals(client: httpx.AsyncClient, model: str, tokens_in: int, tokens_out: int) -> list[float]:
    """When each token came, in seconds since the request."""
    prompt = [next(FIRST_TOKENS), *(random.randrange(300, 900) for _ in range(tokens_in - 1))]
    sampling = {"temperature": TEMPERATURE, "top_p": 1, "top_k": -1, "ignore_eos": True}
    body = {"model": model, "prompt": prompt, "max_tokens": tokens_out, **sampling}
    began, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter() - began)
    return times


async def step_ms(client: httpx.AsyncClient, models: list[str], batch: int) -> float:
    """The median time between tokens while all requests of the batch are being answered."""
    asked = [arrivals(client, models[at % len(models)], PROMPT, BATCHES[batch]) for at in range(batch)]
    answers = await asyncio.gather(*asked)
    together = max(times[0] for times in answers)
    steps = [after - before for times in answers for before, after in pairwise(times) if before >= together]
    return statistics.median(steps) * 1e3


async def layers_of(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """What each layer reports; stock has nothing."""
    states = (await client.get("/server_info")).json().get("internal_states", [{}])
    layers: list[dict[str, Any]] = states[0].get("kt_launch", {}).get("layers", [])
    return layers


class Replayed(NamedTuple):
    """What replayed steps took so far."""

    steps: int
    kernels_ms: float
    experts: float
    """Whose weights the steps read in a layer, added up."""


async def replayed(client: httpx.AsyncClient) -> Replayed:
    layers = await layers_of(client)
    if not layers:
        return Replayed(0, 0, 0)
    steps, busy_ns, experts = (
        [layer[name] for layer in layers] for name in ("replayed", "replayed_ns", "replayed_experts")
    )
    return Replayed(max(steps), sum(busy_ns) / 1e6, statistics.mean(experts))


async def eager_ms(client: httpx.AsyncClient) -> float:
    """Milliseconds that the kernels took in all other steps so far."""
    return sum(float(layer["eager_ns"]) for layer in await layers_of(client)) / 1e6


async def decode(client: httpx.AsyncClient, models: list[str], batch: int) -> Figures:
    """The step, how long its kernels took of it and how many experts of a layer they read: the mean of the steps
    that began in this batch."""
    before = await replayed(client)
    found = {"decode_ms": round(await step_ms(client, models, batch), 1)}
    after = await replayed(client)
    if steps := after.steps - before.steps:
        found["kernels_ms"] = round((after.kernels_ms - before.kernels_ms) / steps, 1)
        found["experts"] = round((after.experts - before.experts) / steps, 1)
    return found


async def prefill(client: httpx.AsyncClient, models: list[str], tokens: int) -> Figures:
    """One prompt, or at the same moment one for each of the models that are this long together: the time to the last
    first token, and how long the kernels took of it, if they did."""
    before = await eager_ms(client)
    answers = await asyncio.gather(*(arrivals(client, model, tokens // len(models), 1) for model in models))
    found = {"prefill_ms": float(round(max(times[0] for times in answers) * 1e3))}
    after = await eager_ms(client)
    if after > before:
        found["kernels_ms"] = round(after - before, 1)
    return found


async def in_turns(names: list[str], measured: Callable[[list[str]], Awaitable[Figures]], **row: float) -> None:
    """A line for each of these names."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found[name].append(await measured(name.split("+")))
    for name, passes in found.items():
        each = {figure: [one[figure] for one in passes if figure in one] for one in passes for figure in one}
        medians = {figure: round(statistics.median(values), 1) for figure, values in each.items()}
        print(json.dumps({"models": name, **row, **medians, "passes": each}), flush=True)


async def measure(client: httpx.AsyncClient, names: list[str]) -> None:
    for model in {model for name in names for model in name.split("+")}:
        await arrivals(client, model, 16, 8)
    for batch in BATCHES:
        await in_turns(names, partial(decode, client, batch=batch), requests=batch)
    for tokens in PREFILLS:
        for name in names:
            await prefill(client, name.split("+"), tokens)
        await in_turns(names, partial(prefill, client, tokens=tokens), tokens=tokens)


async def main() -> None:
    random.seed(7)
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=300, limits=httpx.Limits(max_connections=200)) as client:
        await measure(client, sys.argv[2:])


if __name__ == "__main__":
    asyncio.run(main())
