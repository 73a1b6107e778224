"""`benchmarks/run.py --quick` on a tiny shape: the records that it promises, and the page made from such records."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIELDS = {
    "impl": str,
    "method": str,
    "isa": str,
    "shape": str,
    "tokens": int,
    "adapters": int,
    "rank": int,
    "threads": int,
    "ms": float,
    "weight_gbs": float,
    "gflops": float,
    "ideal_ms": float,
    "rel_l2": float,
}
# Relative L2 of a layer on Gaussian weights, with room for the few tokens of these batches.
LIMITS = {"AMXBF16_SFT": 0.006, "AMXINT8_SFT": 0.035, "AMXINT4_SFT": 0.17}
PAGE = "before\n<!-- table avx512-speed -->\nold\n<!-- end -->\n<!-- table first-light -->\n<!-- end -->\nafter\n"


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of records of a run over 512 x 352 x 16 experts, and what it printed."""
    file = tmp_path_factory.mktemp("bench") / "avx512-quick.json"
    cells = (
        "--shapes",
        "small",
        "--tokens",
        "1,16",
        "--adapters",
        "none,1x8",
        "--cell-s",
        "0.02",
        "--threads",
        "1",  # other tests run beside it, and those of torch and of the peaks wait busily
        "--once",
        "--limit-s",
        "250",
    )
    done = run_script("run.py", "--quick", "--json", str(file), *cells)
    assert done.returncode == 0, done.stdout + done.stderr
    return file, done.stdout


def records_of(file: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(file.read_text())
    return records


def test_records_have_the_promised_fields(quick: tuple[Path, str]) -> None:
    records = records_of(quick[0])
    for record in records:
        assert {name: type(record[name]) for name in FIELDS} == FIELDS
        assert all(record[name] > 0 for name in ("ms", "weight_gbs", "gflops", "ideal_ms"))
    ours = {(r["method"], r["tokens"], r["adapters"]) for r in records if r["impl"] == "kt_kernels"}
    assert ours == {(method, tokens, count) for method in LIMITS for tokens in (1, 16) for count in (0, 1)}
    assert {"torch_loop", "torch_grouped_mm"} <= {record["impl"] for record in records}


def test_ours_is_right_where_it_is_timed(quick: tuple[Path, str]) -> None:
    for record in records_of(quick[0]):
        if record["impl"] == "kt_kernels":
            assert record["rel_l2"] <= LIMITS[record["method"]], record


def test_ratios_are_printed_with_quartiles(quick: tuple[Path, str]) -> None:
    assert re.search(r"small +AMXBF16_SFT +none +16 +torch_loop +\d+\.\d+ \(\d+\.\d+-\d+\.\d+\)", quick[1])


def test_the_picture_is_drawn(quick: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    assert quick[0].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_shape_leaves_no_records(tmp_path: Path) -> None:
    done = run_script("run.py", "--quick", "--json", str(tmp_path / "x.json"), "--shapes", "no-such")
    assert done.returncode == 2
    assert "no-such" in done.stderr and "v2-lite" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_the_page_is_filled_from_the_records(quick: tuple[Path, str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ("--results", str(quick[0].parent), "--page", str(page))
    assert run_script("report.py", *arguments, "--check").returncode == 1
    assert run_script("report.py", *arguments).returncode == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    first = next(r for r in records_of(quick[0]) if r["method"] == "AMXBF16_SFT" and r["tokens"] == 1)
    assert f"{100 * first['limit']['median']:.0f} %" in text
    assert run_script("report.py", *arguments, "--check").returncode == 0


def test_the_committed_page_shows_the_committed_results() -> None:
    page = BENCHMARKS.parent / "docs" / "performance.md"
    done = run_script("report.py", "--check", "--results", str(BENCHMARKS / "results"), "--page", str(page))
    assert done.returncode == 0, done.stdout
