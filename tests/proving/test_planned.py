"""Whether a plan holds the whole model against transformers, and the reason that it gives when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import GIB, Machine
from tiny_files import write_checkpoint

from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import read_facts
from kt_launch.machine.host import read_host
from kt_launch.machine.ports import Port
from kt_launch.planning.draft import Facts
from kt_launch.planning.proof import RUN_BYTES
from kt_launch.planning.resolve import resolve
from kt_model.checkpoint import read_checkpoint
from kt_model.errors import Problems
from kt_model.plan import Resolved
from kt_model.tensors.header import Tensor

KEY = "proof.whole_model"


def facts(folder: Path, available_bytes: int = 64 * GIB, **changes: Any) -> Facts:
    checkpoint = write_checkpoint(folder / "model", vocab_size=512)
    made, _ = validate({"model": {"path": str(checkpoint)}, "server": {"device": "cpu"}})
    host = read_host(Machine(memory_bytes=2 * available_bytes).write(folder / "machine"))
    found = read_facts(made, Sources(), Problems(), host)
    return replace(found, port=Port(30000, True), **changes)


def resolved(found: Facts, **proof: Any) -> Resolved:
    assert found.checkpoint is not None
    made, mistakes = validate(
        {"model": {"path": str(found.checkpoint.path)}, "server": {"device": "cpu"}, "proof": proof}
    )
    assert mistakes == []
    return resolve(made, found, Sources(), Problems()).resolved[KEY]


def larger(found: Facts, size: int) -> Facts:
    """A further tensor of so many bytes in bfloat16."""
    assert found.checkpoint is not None
    located = dict(found.checkpoint.located)
    first = next(iter(located.values()))
    located["model.norm.weight"] = replace(first, tensor=Tensor("BF16", (size // 2,), 0, size))
    return replace(found, checkpoint=replace(found.checkpoint, located=located))


def test_a_small_checkpoint_is_held_against_transformers(tmp_path: Path) -> None:
    assert resolved(facts(tmp_path)) == Resolved("auto", "default")


def test_a_large_one_is_not_unless_the_limit_is_raised(tmp_path: Path) -> None:
    found = larger(facts(tmp_path), 3 * GIB)
    assert resolved(found) == Resolved("off", "derived: 3.00 GiB on disk, more than proof.whole_model_gib=2")
    assert resolved(found, whole_model_gib=3.5).value == "auto"


def test_memory_that_the_server_leaves_has_to_hold_it_in_float32(tmp_path: Path) -> None:
    short = facts(tmp_path, available_bytes=3 * GIB)
    message = resolved(short)
    assert message.value == "off"
    assert message.source.startswith("derived: it takes 2.00 GiB of memory, and the server leaves 1.")
    assert RUN_BYTES == 2 * GIB


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transformers": False}, "derived: transformers is not installed"),
        ({"checkpoint": 0}, "derived: config.json has no vocab_size"),
    ],
)
def test_what_it_needs_is_told(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = facts(tmp_path)
    if "checkpoint" in changes:
        changes = {"checkpoint": replace(read_checkpoint(tmp_path / "model"), vocab_size=0)}
    assert resolved(replace(found, **changes)) == Resolved("off", reason)


def test_it_can_be_typed_off(tmp_path: Path) -> None:
    assert resolved(facts(tmp_path), whole_model="off").value == "off"
