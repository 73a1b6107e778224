"""The report's tables: every form says the same, and failed rows say why."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import failed, some_rows

from kt_launch.bench.client import STATISTICS, TIMES, Load, read_result
from kt_launch.sweeps.page import to_html
from kt_launch.sweeps.report import show_report, write_report
from kt_launch.sweeps.summary import summarize
from kt_launch.sweeps.tables import HEADINGS, lines, settings, to_csv, to_json, to_markdown


def test_one_line_for_each_target_of_each_row() -> None:
    shown = lines(some_rows())
    assert [line.cells[1] for line in shown] == ["base", "west", "base", "west", "base", "west", "-"]
    assert all(len(line.cells) == len(HEADINGS) for line in shown)
    first = dict(zip(HEADINGS, shown[0].cells, strict=True))
    assert first["first token, ms"] == "67" and first["KL to BF16"] == "0" and first["result"] == "ok"
    assert first["tokens/s"].endswith("(at 8)")


def test_settings_are_what_differs() -> None:
    rows = some_rows()
    assert [settings(row, rows) for row in rows][:2] == ["kt.method=bf16", "kt.method=int8"]
    assert settings(rows[0], rows[:1]) == "model=demo kt.method=bf16 action=bench"


def test_markdown_has_a_column_for_each_heading_and_escapes_bars() -> None:
    rows = [*some_rows(), failed(4)]
    rows[4]["error"] = "a|b\nc"
    table = [line for line in to_markdown(rows).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 8
    assert {line.replace("\\|", "").count("|") for line in table} == {len(HEADINGS) + 1}
    assert "crashed: a\\|b c" in table[-1]


def test_no_form_takes_a_cell_for_more_than_text() -> None:
    rows = [*some_rows(), failed(4)]
    rows[4]["error"] = "<img src=x onerror=alert(1)>\u202e\x1b[2J"
    for text in (to_markdown(rows), to_html(rows)):
        assert "&lt;img src=x onerror=alert(1)&gt;\\u202e\\x1b[2J" in text
        assert not {character for character in text if not character.isprintable()} - {"\n", "\t"}


def test_csv_has_a_line_for_each_load_and_each_failure() -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(some_rows()))))
    assert len(read) == 3 * 8 + 1
    assert float(read[8]["output_tokens_per_s"]) == pytest.approx(96)
    assert read[-1]["state"] == "crashed" and read[-1]["concurrency"] == ""
    assert {"ttft_ms_p90", "peak_rss_bytes", "kl_mean", "top1_agreement"} <= set(read[0])


def test_json_is_the_rows() -> None:
    said = json.loads(to_json(some_rows()))
    assert said["format"] == 1
    assert said["rows"] == json.loads(json.dumps(some_rows()))


def test_report_is_shown_and_written_in_all_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(some_rows())
    shown = capsys.readouterr().out
    table, _, rest = shown.partition("kt.method=fp8")
    assert "killed by SIGKILL" in rest and "is the fastest" in rest
    assert max(map(len, table.splitlines())) <= 80
    (verdict,) = (line for line in rest.splitlines() if "is the fastest" in line)
    assert verdict.endswith(".")  # a pipe gets sentences whole
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        f"kt.method={method}" for method in ("bf16", "int8", "int4") for _ in range(2)
    ]
    page = write_report(some_rows(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"results.{form}" for form in ("md", "csv", "json", "html")}
    assert page.name == "results.html"


def test_a_time_that_the_benchmark_had_nothing_to_measure_by_is_no_number() -> None:
    load = Load("base", "demo", 1, requests=4, input_tokens=8, output_tokens=2, warmup=0, chat=True)
    counts = ("total_input_tokens", "total_output_tokens", "duration", "request_throughput", "output_throughput")
    said = dict.fromkeys(counts, 4) | {"completed": 4, "total_throughput": 9.0}
    said |= {f"{kind}_{name}_ms": 0.0 if name in ("tpot", "itl") else 7.0 for kind in STATISTICS
             for name in TIMES.values()}  # fmt: skip
    found = read_result(load, said)
    assert found["tpot_ms"] is found["itl_ms"] is None
    assert found["ttft_ms"]["median"] == 7.0
    (first, *others) = some_rows()
    row: Any = {**first, "loads": [found]}
    assert lines([row])[0].cells[2:4] == ("7", "-")
    assert summarize(row)["tpot_ms"] is None and summarize(row)["ttft_ms"] == 7.0
    assert next(csv.DictReader(io.StringIO(to_csv([row]))))["tpot_ms_median"] == ""
    assert "0.0 ms" not in to_html([row, *others]) and to_html([row])
