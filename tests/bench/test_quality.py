"""The comparison with BF16: zero for the same, the true KL where the whole vocabulary is listed, else a lower bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kt_launch.bench.quality import Predictions, compare, divergence, reference_key
from kt_launch.proving.passages import passages
from kt_model.errors import LaunchError

VOCABULARY = 40


def logprobs(seed: int, spread: float = 2.0) -> np.ndarray:
    """(V,) float32, a distribution."""
    logits = np.random.default_rng(seed).normal(0, spread, VOCABULARY)
    found: np.ndarray = logits - np.log(np.exp(logits).sum())
    return found.astype(np.float32)


def top(row_V: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-row_V)[:count].astype(np.int32)
    return ids, row_V[ids]


def kl(p_V: np.ndarray, q_V: np.ndarray) -> float:
    p, q = p_V.astype(np.float64), q_V.astype(np.float64)
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_same_is_exactly_zero(seed: int) -> None:
    row = top(logprobs(seed), 10)
    assert divergence(*row, *row)[0] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_whole_vocabularies_give_the_true_divergence(seed: int) -> None:
    p, q = logprobs(seed), logprobs(seed + 100)
    found, covered = divergence(*top(p, VOCABULARY), *top(q, VOCABULARY))
    assert found == pytest.approx(kl(p, q), abs=1e-5)
    assert covered == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("count", [2, 5, 20])
@pytest.mark.parametrize("seed", range(5))
def test_a_part_gives_a_lower_bound(seed: int, count: int) -> None:
    p, q = logprobs(seed), logprobs(seed + 100)
    found, covered = divergence(*top(p, count), *top(q, count))
    assert 0.0 <= found <= kl(p, q) + 1e-6
    assert 0.0 <= covered <= 1.0 + 1e-6


def test_nothing_in_common_is_far_apart() -> None:
    p_V = np.log(np.full(4, 0.24, np.float32))
    q_V = np.log(np.array([0.5, 0.3, 0.1, 0.01], np.float32))
    ids = np.arange(4, dtype=np.int32)
    found, covered = divergence(ids, p_V, ids + 4, q_V)
    assert covered == 0.0
    assert found == pytest.approx(0.96 * np.log(0.96 / 0.04) + 0.04 * np.log(0.04 / 0.96), rel=1e-3)


def predictions(seed: int, positions: int = 12, count: int = 8) -> Predictions:
    rows = [top(logprobs(seed + position), count) for position in range(positions)]
    tokens = np.arange(positions, dtype=np.int32)
    return Predictions(tokens, np.stack([ids for ids, _ in rows]), np.stack([row for _, row in rows]))


def test_comparison_of_two_servers() -> None:
    one, other = predictions(0), predictions(500)
    same = compare(one, one)
    assert (same.tokens, same.kl_mean, same.kl_max, same.top1_agreement) == (12, 0.0, 0.0, 1.0)
    found = compare(one, other)
    assert 0 < found.kl_mean < found.kl_max and found.top1_agreement < 0.5


def test_references_survive_the_disk_and_others_are_refused(tmp_path: Path) -> None:
    one = predictions(3)
    one.write(tmp_path / "one.npz")
    assert compare(one, Predictions.read(tmp_path / "one.npz")).kl_max == 0.0
    (tmp_path / "two.npz").write_bytes(b"no")
    with pytest.raises(LaunchError, match=r"bench\.reference: .*two\.npz is not a reference"):
        Predictions.read(tmp_path / "two.npz")
    with pytest.raises(LaunchError, match="belongs to another tokenizer"):
        compare(one, predictions(3, positions=11))


def test_a_reference_depends_on_every_byte_it_was_computed_from() -> None:
    keys = {
        reference_key({"model.safetensors": "1"}, {}, 256, "cpu"),
        reference_key({"model.safetensors": "2"}, {}, 256, "cpu"),
        reference_key({"model.safetensors": "1"}, {"adapter_model.safetensors": "1"}, 256, "cpu"),
        reference_key({"model.safetensors": "1"}, {}, 128, "cpu"),
        reference_key({"model.safetensors": "1"}, {}, 256, "cuda"),
    }
    assert len(keys) == 5


def test_the_shipped_text_is_varied_and_its_passages_short() -> None:
    assert 6 <= len(passages()) <= 20
    assert all(100 < len(passage) < 1000 for passage in passages())
