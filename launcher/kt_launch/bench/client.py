"""Load generation: SGLang's own serving benchmark, run through its command line against the running server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kt_launch.machine.processes import stop
from kt_launch.watching.client import without_proxy
from kt_model.errors import BenchFailed
from kt_model.jsonfile import write_json

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET = {"PYTHONWARNINGS": ""}
CLIENT_LOG = "client.log"
STATISTICS = ("mean", "median", "p90", "p99")
TIMES = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "latency_ms": "e2e_latency"}
"""Our name → SGLang's: time to first token, mean gap per request, single gap, whole request."""


@dataclass(frozen=True)
class Load:
    """One load on one target: number of requests, concurrency, and tokens in and out of each."""

    target: str
    """base, or an adapter's name."""
    model: str
    """The model name in requests: model or model:adapter."""
    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    warmup: int
    chat: bool


def write_prompts(text: str, count: int, file: Path) -> None:
    """Prompts in the form that the benchmark samples from. Each begins at a different place in the text, so that no two
    share a prefix that the server could have cached."""
    words = text.split()
    step = max(1, len(words) // count)
    starts = [(number * step) % len(words) for number in range(count)]
    turns = [" ".join([f"{number}.", *words[start:], *words[:start]]) for number, start in enumerate(starts)]
    rows = [{"conversations": [{"from": "human", "value": turn}, {"from": "gpt", "value": "-"}]} for turn in turns]
    write_json(file, rows)


class LoadClient:
    """A process that has imported the benchmark and runs it for one load after another, from `with` to its end. It is
    started with the first load, so as not to disturb the server's start."""

    def __init__(self, url: str, checkpoint: str, folder: Path) -> None:
        self._url, self._checkpoint, self._folder = url, checkpoint, folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop(self._process, grace_s=0)

    def run(self, load: Load, prompts: Path) -> dict[str, Any]:
        """Runs the benchmark; returns what it measured. Raises BenchFailed with its last output line if it fails."""
        stem = f"{load.target.replace('/', '-')}-{load.concurrency}"
        results, log = self._folder / f"{stem}.jsonl", self._folder / f"{stem}.log"
        results.unlink(missing_ok=True)
        words = [*arguments(load, self._url, self._checkpoint, prompts), "--output-file", str(results)]
        code = self._run(words, log)
        if code != 0 or not results.is_file():
            said = _lines(log) or _lines(self._folder / CLIENT_LOG)
            problem = f"SGLang's benchmark exited with code {code}: {said[-1] if said else 'without output'}"
            raise BenchFailed("bench", problem, f"its log is {log}")
        return read_result(load, json.loads(results.read_text().splitlines()[-1]))

    def _run(self, words: list[str], log: Path) -> int:
        """The benchmark's exit code; if the process ends without reporting one, its own."""
        log.write_text("")
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            print(json.dumps({"arguments": words, "log": str(log)}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        return int(answer) if answer else self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with (self._folder / CLIENT_LOG).open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "kt_sglang.bench_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **OFFLINE, **QUIET, **without_proxy(os.environ, [self._url])},
            )


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]


def arguments(load: Load, url: str, checkpoint: str, prompts: Path) -> list[str]:
    """The benchmark's command line."""
    return [
        *("--backend", "sglang-oai-chat" if load.chat else "sglang-oai", "--base-url", url),
        *("--model", checkpoint, "--served-model-name", load.model, "--tokenizer", checkpoint),
        *("--dataset-name", "random", "--dataset-path", str(prompts), "--random-range-ratio", "1.0"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--warmup-requests", str(load.warmup), "--flush-cache", "--seed", "1"),
        *("--disable-tqdm", "--output-details"),
    ]


def read_result(load: Load, report: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's result line as one load of our record."""
    errors = [error for error in report.get("errors", []) if error]
    found: dict[str, Any] = {
        "target": load.target,
        "model": load.model,
        "concurrency": load.concurrency,
        "requests": load.requests,
        "completed": report["completed"],
        "error": errors[0].strip().splitlines()[-1] if errors else None,
        "input_tokens": report["total_input_tokens"],
        "output_tokens": report["total_output_tokens"],
        "duration_s": round(report["duration"], 3),
        "requests_per_s": round(report["request_throughput"], 3),
        "output_tokens_per_s": round(report["output_throughput"], 2),
        "total_tokens_per_s": round(report["total_throughput"], 2),
    }
    return found | {ours: _times(theirs, report) for ours, theirs in TIMES.items()}


def _times(name: str, report: Mapping[str, Any]) -> dict[str, float] | None:
    """One kind of time; the benchmark reports 0 if no answer had two pieces to measure between, which is not a time."""
    found = {kind: round(report[f"{kind}_{name}_ms"], 2) for kind in STATISTICS}
    return found if found["mean"] > 0 else None


def median_ms(load: Mapping[str, Any], times: str, digits: int) -> str:
    """A load's median of one kind of time as text, or a dash if it was not measured."""
    found = load.get(times)
    return f"{found['median']:.{digits}f}" if found else "-"
