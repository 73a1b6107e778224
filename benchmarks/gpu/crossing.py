"""From how many tokens on a layer's experts are faster on the GPU: what a start measured and chose, as a picture.

crossing.py RUN-FOLDER/proof.json OUT.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 720, 360, 60, 30
BLUE, RED, GREY = "#4477aa", "#ee6677", "#888888"
Point = tuple[float, float]


def drawing(found: dict[str, Any]) -> str:
    """found: `prefill` of proof.json."""
    rows: list[tuple[int, float, float]] = found["measured"]
    most_ms = 1.1 * max(max(cpu + found["between_ms"], gpu) for _, cpu, gpu in rows)
    least, most = math.log2(rows[0][0]), math.log2(rows[-1][0])

    def place(tokens: float, ms: float) -> Point:
        across = (math.log2(tokens) - least) / (most - least) * (WIDTH - LEFT - 110)
        return LEFT + across, HEIGHT - 50 - ms / most_ms * (HEIGHT - 50 - TOP)

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12"><rect width="100%" height="100%" fill="white"/>',
            *_axes([row[0] for row in rows], most_ms, place),
            _curve([place(tokens, cpu) for tokens, cpu, _ in rows], BLUE, "CPU"),
            _curve([place(tokens, gpu) for tokens, _, gpu in rows], RED, "GPU"),
            _curve([place(tokens, cpu + found["between_ms"]) for tokens, cpu, _ in rows], GREY, "CPU and rest"),
            *(_chosen(found["tokens"], most_ms, place) if found["tokens"] else []),
            "</svg>",
        ]
    )


def _axes(tokens: Sequence[int], most_ms: float, place: Callable[[float, float], Point]) -> list[str]:
    lines = [f'<text x="{LEFT}" y="18">ms a layer, tokens of a batch</text>']
    for count in tokens:
        x, y = place(count, 0)
        lines.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{count}</text>')
    step = 10 ** math.floor(math.log10(most_ms))
    for mark in range(int(most_ms / step) + 1):
        x, y = place(tokens[0], mark * step)
        lines.append(f'<path d="M{x:.0f} {y:.0f}H{WIDTH - 110}" stroke="#dddddd"/>')
        lines.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{mark * step:g}</text>')
    return lines


def _curve(points: Sequence[Point], color: str, name: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{color}">{name}</text>'
    )


def _chosen(tokens: int, most_ms: float, place: Callable[[float, float], Point]) -> list[str]:
    (x, low), (_, high) = place(tokens, 0), place(tokens, most_ms)
    return [
        f'<path d="M{x:.1f} {low:.0f}V{high:.0f}" stroke="{GREY}" stroke-dasharray="4"/>',
        f'<text x="{x:.0f}" y="{low + 36:.0f}" fill="{GREY}" text-anchor="middle">GPU from {tokens} tokens on</text>',
    ]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(drawing(json.loads(Path(sys.argv[1]).read_text())["prefill"]) + "\n")
