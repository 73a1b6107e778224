"""One decode step as a picture: what the GPU computes and copies, when the CPU computes experts, and when both wait.

SGLANG_TORCH_PROFILER_DIR=TRACES picture.py URL OUT.svg [MODEL] [REQUESTS]: the server must run with the same variable,
into which SGLang's profiler writes, with server.metrics_port=0, which makes it keep when its layers ran, and with
server.admin_key=env:KT_LAUNCH_ADMIN_KEY, without which nobody may profile it. Prints a line of JSON: milliseconds of
the step by what went on.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx

STEPS = 48
TOKENS = 64
PROMPT = 32
WIDTH, LANE = 1200, 46
BLUE, YELLOW, RED, GREY = "#4477aa", "#ccbb44", "#ee6677", "#bbbbbb"
HANDS_OVER, TAKES_BACK = "kt_hand_over", "kt_take_back"
"""kt_sglang's kernels around the experts on the CPU (mailbox.cu)."""
Span = tuple[float, float]


class Lane(NamedTuple):
    name: str
    color: str
    spans: Sequence[Span]


class Step(NamedTuple):
    """Spans in milliseconds since the step's first layer of experts began; it ends where that of the next one does."""

    ms: float
    lanes: Sequence[Lane]


async def answer(client: httpx.AsyncClient, model: str) -> None:
    prompt = [random.randrange(300, 900) for _ in range(PROMPT)]
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    (await client.post("/v1/completions", json=body)).raise_for_status()


async def trace(client: httpx.AsyncClient, model: str, requests: int, folder: Path) -> tuple[Any, Any]:
    """SGLang's trace of a batch's first steps, and the layers' own times of its last ones: they meet in the middle."""
    known = set(folder.rglob("*.trace.json.gz"))
    profile = {"num_steps": STEPS, "activities": ["GPU"]}
    (await client.post("/start_profile", json=profile)).raise_for_status()
    await asyncio.gather(*(answer(client, model) for _ in range(requests)))
    for _ in range(300):
        for file in set(folder.rglob("*.trace.json.gz")) - known:
            with contextlib.suppress(EOFError, ValueError):  # still being written
                return json.loads(gzip.decompress(file.read_bytes())), await recent(client)
        await asyncio.sleep(0.1)
    raise SystemExit("SGLang wrote no trace")


async def recent(client: httpx.AsyncClient) -> list[list[tuple[int, int, int]]]:
    states = (await client.get("/server_info")).json()["internal_states"]
    layers = [layer["recent"] for layer in states[0]["kt_launch"]["layers"]]
    if None in layers:
        raise SystemExit("the server does not keep when its layers ran: start it with server.metrics_port=0")
    return layers


def gpu_spans(found: Any, origin_ns: int, cpu: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Kernels and copies of the trace, in milliseconds since `origin_ns`. The kernel that waits for the CPU copies from
    the moment on that the CPU has finished."""
    base_ns = int(found.get("baseTimeNanoseconds", 0))
    kernels: list[Span] = []
    copies: list[Span] = []
    for event in found["traceEvents"]:
        category, name = event.get("cat"), event.get("name")
        if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        start = (base_ns + event["ts"] * 1e3 - origin_ns) / 1e6
        end = start + event["dur"] / 1e3
        if name == TAKES_BACK:
            start = max([start, *(finished for _, finished in cpu if start < finished < end)])
        (copies if category != "kernel" or name in (HANDS_OVER, TAKES_BACK) else kernels).append((start, end))
    return kernels, copies


def steps_of(found: Any, layers: Sequence[Sequence[tuple[int, int, int]]], requests: int) -> list[Step]:
    """The steps of the whole batch that the trace covers."""
    starts = [start for start, _, rows in layers[0] if rows == requests]
    made = []
    for first, following in pairwise(starts):
        length = (following - first) / 1e6
        cpu = [
            ((a - first) / 1e6, (b - first) / 1e6) for layer in layers for a, b, _ in layer if first <= a < following
        ]
        kernels, copies = (clipped(spans, length) for spans in gpu_spans(found, first, cpu))
        if kernels and min(kernels)[0] < length / 10 and max(kernels)[1] > length * 0.9:
            lanes = (
                Lane("GPU", "#4477aa", kernels),
                Lane("copies", "#ccbb44", copies),
                Lane("CPU experts", "#ee6677", cpu),
            )
            made.append(Step(length, lanes))
    return made


def clipped(spans: Iterable[Span], length: float) -> list[Span]:
    return [(max(a, 0.0), min(b, length)) for a, b in spans if a < length and b > 0]


def union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in union(spans))


def shares(step: Step) -> dict[str, float]:
    """Milliseconds of each lane, and of what is nobody's; lanes overlap, the last two do not."""
    gpu, copies, cpu = (lane.spans for lane in step.lanes)
    everything = total([*gpu, *copies, *cpu])
    return {
        "step_ms": step.ms,
        "cpu_experts_ms": total(cpu),
        "gpu_ms": total(gpu),
        "copies_ms": total(copies),
        "gpu_beside_cpu_ms": total(gpu) + total(cpu) - total([*gpu, *cpu]),
        "gpu_or_copies_alone_ms": everything - total(cpu),
        "waiting_ms": step.ms - everything,
    }


def drawing(step: Step, title: str) -> str:
    """An SVG: a lane each, and one for what is nobody's."""
    busy = union(span for lane in step.lanes for span in lane.spans)
    edges = [0.0, *(edge for span in busy for edge in span), step.ms]
    waiting = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    parts = [f'<text x="8" y="20">{title}</text>']
    for number, lane in enumerate([*step.lanes, Lane("waiting", GREY, waiting)]):
        top = 34 + number * LANE
        parts.append(f'<text x="8" y="{top + 22}">{lane.name} {total(lane.spans):.1f} ms</text>')
        for start, end in union(lane.spans):
            x, width = 190 + start / step.ms * WIDTH, max((end - start) / step.ms * WIDTH, 0.2)
            parts.append(f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{LANE - 12}" fill="{lane.color}"/>')
    height = 40 + (len(step.lanes) + 1) * LANE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 210}" height="{height}" font-family="sans-serif"'
    return f'{head} font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'


async def main() -> None:
    url, out, model, requests = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    random.seed(time.time_ns())
    limits = httpx.Limits(max_connections=200)
    folder = os.environ.get("SGLANG_TORCH_PROFILER_DIR")
    if not folder:
        raise SystemExit("set SGLANG_TORCH_PROFILER_DIR as it is for the server")
    headers = {"Authorization": f"Bearer {os.environ.get('KT_LAUNCH_ADMIN_KEY', '')}"}
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=headers) as client:
        found, layers = await trace(client, model, requests, Path(folder))
    steps = sorted(steps_of(found, layers, requests), key=lambda step: step.ms)
    if not steps:
        raise SystemExit("no whole step was traced")
    step = steps[len(steps) // 2]
    rounded = {name: round(value, 2) for name, value in shares(step).items()}
    out.write_text(drawing(step, f"{model}, {requests} requests: one decode step of {step.ms:.1f} ms"))
    print(json.dumps({"model": model, "requests": requests, "steps": len(steps), **rounded}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
