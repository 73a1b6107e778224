"""Compares the whole model with transformers in float32 (float32_run.py): whether that is possible, the process that
computes it while the server loads, and the comparison once the server answers (agreement.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from kt_launch.machine.processes import start_session, stop
from kt_launch.proving.agreement import Agreement, Reference, compare
from kt_launch.proving.logprobs import Answer, ask, ask_together, random_prompts
from kt_model.contract import BASE, LORA_OPTIONS
from kt_model.errors import ProofFailed
from kt_model.jsonfile import write_json
from kt_model.plan import LaunchPlan

KEY = "proof.whole_model"
LOG, FOLDER = "float32.log", "float32"
WAIT_S = 180.0
"""How long a server that could answer waits for the float32 run."""
POLL_S = 0.05
MOST_THREADS = 16
FAILURE = "failure.txt"


@dataclass
class Findings:
    """The outcome: an agreement per side (`base`, or an adapter's name), or why there is none."""

    sides: dict[str, Agreement] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    together: dict[str, float] = field(default_factory=dict)
    """Median error of first tokens requested for all sides in one batch; empty if there is no adapter."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "checked": {side: found.as_dict() for side, found in self.sides.items()},
            "unchecked": dict(self.unchecked),
            "together": dict(self.together),
        }

    def lines(self) -> list[str]:
        """Sentences for the terminal."""
        lines = [
            f"whole model: {side} is transformers' in float32 over {found.positions} positions: logprobs are off by "
            f"{found.median:.2g} (median; rounding alone: {found.rounding:.2g}){_by(found.how)}"
            for side, found in self.sides.items()
        ]
        if self.together:
            worst = max(self.together.values())
            lines.append(
                f"whole model: {', '.join(self.together)} in one batch give the same, with a difference of "
                f"{worst:.2g} at most"
            )
        reasons = dict.fromkeys(self.unchecked.values())
        for reason in reasons:
            names = ", ".join(side for side, why in self.unchecked.items() if why == reason)
            lines.append(f"whole model: {names} not compared with transformers: {reason}")
        return lines


@dataclass(frozen=True)
class Answers:
    """One side's answers at all positions, and its first tokens from a batch with all sides."""

    alone: Answer
    mixed: Answer | None


def _by(how: str) -> str:
    return f"; adapter by {how}" if how else ""


class Float32Run:
    """The process, from `with` to its end; no process if the plan switches it off."""

    def __init__(self, plan: LaunchPlan, run_folder: Path) -> None:
        self._plan = plan
        self._log = run_folder / LOG
        self._folder = run_folder / FOLDER
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if not self._wanted:
            return self
        self._folder.mkdir(exist_ok=True)
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._prompts = random_prompts(self._plan)
        request = self._folder / "request.json"
        write_json(request, self._request())
        command = [self._plan.argv[0], "-P", "-m", "kt_launch.proving.float32_run", str(request)]
        self._process = start_session(command, self._log, environment())
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            stop(self._process, 0.0)
        self._stack.close()

    def check(self, client: httpx.Client, replicas: int = 1) -> Findings:
        """Query each data-parallel replica for every side, and wait for the reference. Raises ProofFailed if they
        disagree, and httpx.HTTPError."""
        findings = Findings()
        if self._process is None:
            findings.unchecked = dict.fromkeys(self._sides, self._reason)
            return findings
        ranks: list[dict[str, int]] = [{"routed_dp_rank": rank} for rank in range(replicas)] if replicas > 1 else [{}]
        asked = [self._ask(client, rank) for rank in ranks]
        deadline = time.monotonic() + WAIT_S
        for number, side in enumerate(self._sides):
            reference = self._wait(self._folder / f"reference-{number}.npz", deadline)
            if isinstance(reference, str):
                findings.unchecked[side] = reference
                continue
            for answers in asked:
                self._compare(number, side, answers[side], reference, findings)
        return findings

    def _compare(self, number: int, side: str, answers: Answers, reference: Reference, findings: Findings) -> None:
        """With several replicas, the one with the largest error is reported."""
        found = compare(answers.alone, reference)
        if side not in findings.sides or findings.sides[side].median < found.median:
            findings.sides[side] = found
        if not found.holds:
            self._keep(number, answers.alone)
            raise self._failed(side, found)
        if answers.mixed is not None:
            error = compare(answers.mixed, reference.at(self._ends)).median
            findings.together[side] = max(error, findings.together.get(side, 0.0))
            if not error <= found.median_bound:
                raise _mixed_up(side, error, found)

    def _ask(self, client: httpx.Client, rank: dict[str, int]) -> dict[str, Answers]:
        """Each side by itself, and if there are several, all in one batch."""
        names = [None if side == BASE else side for side in self._sides]
        alone = [ask(client, self._prompts, name, **rank) for name in names]
        mixed = ask_together(client, self._prompts, names, **rank) if len(names) > 1 else [None]
        return {side: Answers(one, both) for side, one, both in zip(self._sides, alone, mixed, strict=True)}

    @property
    def _sides(self) -> list[str]:
        return [BASE, *self._plan.adapters]

    @property
    def _ends(self) -> list[int]:
        """Positions of the first tokens after the prompts."""
        return [end - 1 for end in itertools.accumulate(len(prompt) for prompt in self._prompts)]

    @property
    def _wanted(self) -> bool:
        return KEY in self._plan.resolved and self._plan.value(KEY) == "auto"

    @property
    def _reason(self) -> str:
        """Why the plan switched it off."""
        resolved = self._plan.resolved.get(KEY)
        return resolved.source.removeprefix("derived: ") if resolved else "the recorded plan does not ask for it"

    def _request(self) -> dict[str, Any]:
        method, quantized = self._plan.value("kt.method"), self._plan.value("kt.weight_path")
        return {
            "model": self._plan.value("model.path"),
            "method": method,
            "quantized": quantized if quantized != self._plan.value("model.path") else None,
            "resident": self._plan.value("kt.num_gpu_experts"),
            "adapters": list(self._plan.adapters.values()),
            "options": json.loads(self._plan.env.get(LORA_OPTIONS, "{}")),
            "prompts": self._prompts,
            "parent": os.getpid(),
            "threads": threads(),
        }

    def _wait(self, file: Path, deadline: float) -> Reference | str:
        """One side's reference, or why there is none."""
        assert self._process is not None
        while not file.exists():
            ended = self._process.poll() is not None
            if ended and not file.exists():
                return f"transformers could not run it ({self._failure()}); its log is {self._log}"
            if time.monotonic() > deadline:
                return f"transformers took longer than {WAIT_S:g} s"
            time.sleep(POLL_S)
        with np.load(file, allow_pickle=False) as found:
            return Reference(found["ids_NM"], found["logprobs_NM"], found["rounded_N"], str(found["how"]))

    def _failure(self) -> str:
        assert self._process is not None
        try:
            return (self._folder / FAILURE).read_text()
        except OSError:
            return f"exit code {self._process.returncode}"

    def _keep(self, number: int, answer: Answer) -> None:
        """Store the answer in the run folder, for bug reports."""
        served = self._folder / f"served-{number}.npz"
        np.savez(served, ids_NK=answer.ids_NK, logprobs_NK=answer.logprobs_NK)
        self._stack.pop_all()

    def _failed(self, side: str, found: Agreement) -> ProofFailed:
        number, position = self._place(found.worst.position)
        share = max(found.errors, key=lambda name: found.errors[name] / found.bounds[name])
        return ProofFailed(
            "proof" if side == BASE else f"lora.{side}",
            f"the server does not compute the model of {self._plan.value('model.path')}: {share} of {found.positions} "
            f"positions of random prompts have logprobs that are off by more than {found.errors[share]:.2g}, expected "
            f"at most {found.bounds[share]:.2g}, against transformers in float32{_by(found.how)}. Worst: prompt "
            f"{number} of {len(self._prompts)}, position {position}, token {found.worst.token}: logprob "
            f"{found.worst.found:.4g}, expected {found.worst.expected:.4g}",
            f"Its answers would be wrong: {self._way_out()}. If it is transformers that is wrong, {KEY}=off serves it",
        )

    def _way_out(self) -> str:
        words = self._plan.config["server"]["extra_args"]
        flags = ", ".join(word.partition("=")[0] for word in words if word.startswith("--"))
        doubt = f"leave out what of server.extra_args ({flags}) changes what is computed, or " if flags else ""
        return f"{doubt}report this with the run folder"

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the prompt, from 1, and how many of its tokens precede the position."""
        for number, prompt in enumerate(self._prompts, 1):
            if index < len(prompt):
                return number, index + 1
            index -= len(prompt)
        raise AssertionError("no position of the prompts")


def _mixed_up(side: str, found: float, alone: Agreement) -> ProofFailed:
    return ProofFailed(
        "proof" if side == BASE else f"lora.{side}",
        f"asked in one batch with others, first tokens of {side} have logprobs that are off by {found:.2g} in the "
        f"median, expected at most {alone.median_bound:.2g}; asked alone they are right ({alone.median:.2g})",
        "Requests of one batch are mixed up: report this with the run folder",
    )


def threads() -> int:
    """Half of what this process may use: the server loads on the rest."""
    return max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2))


def environment() -> dict[str, str]:
    """No downloads, no GPU, and waiting threads must not compete with the server's by spinning."""
    own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **own, "OMP_NUM_THREADS": str(threads()), "TOKENIZERS_PARALLELISM": "false"}
