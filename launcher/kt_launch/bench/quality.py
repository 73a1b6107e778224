"""How far a server's predictions are from a BF16 server's: compares the logprobs of every token of a shipped text.

The reference is computed once for a model or adapter by a BF16 server and cached under the hash of everything it
depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from kt_launch.proving.generate import post
from kt_launch.proving.passages import passages, text_file
from kt_model.atomic_file import whole_file
from kt_model.digests import sha256_of
from kt_model.errors import BenchFailed, LaunchError
from kt_model.installed import version_of

SMALLEST = 1e-12

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Predictions:
    """N positions of the text: its own token, and the K most probable ones with their logprobs."""

    tokens_N: Integers
    top_NK: Integers
    logprobs_NK: Floats

    def write(self, file: Path) -> None:
        """Atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as opened:
            np.savez_compressed(opened, tokens_N=self.tokens_N, top_NK=self.top_NK, logprobs_NK=self.logprobs_NK)

    @classmethod
    def read(cls, file: Path) -> Predictions:
        """Raises LaunchError if the file is not such a reference."""
        try:
            with np.load(file, allow_pickle=False) as found:
                return cls(found["tokens_N"], found["top_NK"], found["logprobs_NK"])
        except (OSError, ValueError, KeyError) as failure:
            problem = f"{file} is not a reference that kt-launch bench wrote ({failure})"
            raise LaunchError("bench.reference", problem, "Remove it; it will be computed again.") from failure


@dataclass(frozen=True)
class Quality:
    """A comparison. KL is a lower bound of the KL over the whole vocabulary: the smallest value that both lists of
    probable tokens allow. `covered` is the reference's probability of the tokens that both list."""

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    covered: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "kl": {"mean": self.kl_mean, "max": self.kl_max},
            "top1_agreement": self.top1_agreement,
            "covered": self.covered,
        }


def read_predictions(client: httpx.Client, adapter: str | None, top: int) -> Predictions:
    """Ask the server for its predictions at each position of each passage, through SGLang's own /generate."""
    tokens: list[int] = []
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for passage in passages():
        for token, row in _ask(client, passage, adapter, top):
            tokens.append(token)
            ids.append([entry[1] for entry in row])
            logprobs.append([entry[0] for entry in row])
    return Predictions(np.array(tokens, np.int32), np.array(ids, np.int32), np.array(logprobs, np.float32))


def _ask(client: httpx.Client, passage: str, adapter: str | None, top: int) -> Iterable[tuple[int, list[list[Any]]]]:
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}
    answer = post(client, text=passage, lora_path=adapter, **options)
    if answer.is_error:
        raise BenchFailed("bench.quality", f"/generate answered {answer.status_code}: {answer.text[:300]}")
    meta = answer.json()["meta_info"]
    # The first token of a text is predicted from nothing, and has no row.
    for (_, token, _), row in zip(meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:], strict=True):
        yield token, row


def compare(reference: Predictions, found: Predictions) -> Quality:
    """Raises LaunchError if the two are for different tokens."""
    if not np.array_equal(reference.tokens_N, found.tokens_N):
        problem = "the reference was computed for other tokens of the text"
        raise LaunchError("bench.reference", problem, "It belongs to another tokenizer; leave bench.reference out.")
    rows = [
        divergence(*row)
        for row in zip(reference.top_NK, reference.logprobs_NK, found.top_NK, found.logprobs_NK, strict=True)
    ]
    kl, covered = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    agreed = reference.top_NK[:, 0] == found.top_NK[:, 0]
    return Quality(len(rows), float(kl.mean()), float(kl.max()), float(agreed.mean()), float(covered.mean()))


def divergence(ids: Integers, logprobs: Floats, other_ids: Integers, other_logprobs: Floats) -> tuple[float, float]:
    """A lower bound of KL(first ‖ other) at one position, given both lists, and the first's share of what both list.

    Three kinds of tokens: those in both lists, each a bin; those listed only by the first, each of which has in the
    other at most its smallest listed probability; all others. KL over bins is never above KL over tokens.
    """
    _, mine, others = np.intersect1d(ids, other_ids, assume_unique=True, return_indices=True)
    log_p, log_q = logprobs[mine].astype(np.float64), other_logprobs[others].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    left_p, left_q = max(1.0 - float(p.sum()), SMALLEST), max(1.0 - float(q.sum()), SMALLEST)
    only_p = min(max(float(np.exp(logprobs.astype(np.float64)).sum() - p.sum()), 0.0), left_p)
    room_q = (len(ids) - len(mine)) * float(np.exp(other_logprobs.astype(np.float64).min()))
    only_q = min(room_q, left_q * only_p / left_p)
    kl = float((p * (log_p - log_q)).sum()) + _term(only_p, only_q) + _term(left_p - only_p, left_q - only_q)
    return max(kl, 0.0), float(p.sum())


def _term(p: float, q: float) -> float:
    """One bin's contribution to a KL."""
    return p * math.log(p / max(q, SMALLEST)) if p > SMALLEST else 0.0


def reference_key(files: Mapping[str, str], adapter: Mapping[str, str], top: int, device: str) -> str:
    """The hash of everything that a reference depends on: checkpoint, adapter, text, number of logprobs, device,
    versions."""
    depends = {
        "checkpoint": dict(sorted(files.items())),
        "adapter": dict(sorted(adapter.items())),
        "text": sha256_of(text_file()),
        "top": top,
        "device": device,
        "versions": {name: version_of(name) for name in ("sglang", "torch", "transformers", "kt-launch")},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
