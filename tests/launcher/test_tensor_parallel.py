"""Ranks of tensor parallelism that cannot share a model out are refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_checkpoint

Launch = Callable[..., Any]


@pytest.fixture
def planned(launch: Launch, tmp_path: Path) -> Launch:
    """Plans a model of 6 heads, expert width 16, with these arguments for SGLang."""

    def call(extra: str, *words: str, **changes: Any) -> Any:
        path = write_checkpoint(tmp_path / "model", num_attention_heads=6, **changes)
        own = ("action=plan", "server.device=cpu", "model=auto", f"model.path={path}", f"server.extra_args=[{extra}]")
        return launch(*own, *words)

    return call


@pytest.mark.parametrize(
    "extra", ["--tp-size,2", "--tensor-parallel-size,2", "--tp-size=2", "--tp-size,1", "--tp-size"]
)
def test_ranks_that_share_evenly_are_taken(planned: Launch, extra: str) -> None:
    assert planned(extra).code == 0


@pytest.mark.parametrize(
    ("extra", "message", "fix"),
    [
        (
            "--tp-size,4",
            "4 ranks cannot split what config.json has: num_attention_heads 6",
            "Use --tp-size 2 there.",
        ),
        (
            "--tp-size=3",
            "3 ranks cannot split what config.json has: moe_intermediate_size 16",
            "Use --tp-size 2 there.",
        ),
        (
            "--tensor-parallel-size,5",
            "5 ranks cannot split what config.json has: num_attention_heads 6, moe_intermediate_size 16",
            "Use --tensor-parallel-size 2 there.",
        ),
        ("--enable-dp-attention,--tp-size,3", "config.json has: moe_intermediate_size 16.", "Use --tp-size 2 there."),
    ],
)
def test_ranks_that_do_not_are_refused_with_fewer(planned: Launch, extra: str, message: str, fix: str) -> None:
    ended = planned(extra)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.rstrip().endswith(fix)


def test_a_width_that_only_one_rank_can_have(planned: Launch) -> None:
    ended = planned("--tp-size,2", intermediate_size=25)
    assert "server.extra_args: 2 ranks cannot split what config.json has: intermediate_size 25. Leave" in ended.err


def test_groups_that_share_a_scale_are_not_cut(planned: Launch) -> None:
    ended = planned("--tp-size,2", "kt.method=int4", "kt.prepare=true")
    assert "2 ranks cannot split experts of inner width 16 in groups of 32 (int4)" in ended.err
