"""The launcher on files that anybody may have written: an answer or a line that names the mistake, in little time.

The same cases by default; `make fuzz` goes on for an hour with others.
"""

from __future__ import annotations

import io
import json
import os
import resource
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hostile_files import DOCUMENTS, TERMINAL, as_json, damage, mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_files import write_adapter, write_checkpoint

from kt_launch.cli import main
from kt_launch.commandline.terminal import print_mistakes, print_table
from kt_model.errors import LaunchError
from kt_model.printable import readable_json, say

MOST_S = 2.0
MOST_BYTES = 300 << 20
PRESET: dict[str, Any] = {
    "model": {"name": "tiny"},
    "kt": {"method": "bf16", "cpuinfer": 2, "expert_profile": None},
    "lora": {"max_rank": 8, "target_modules": ["gate_proj"], "adapters": {}},
    "server": {"port": 30000, "context_length": 64, "extra_args": ["--log-level", "info"], "start_timeout_s": 60},
    "proof": {"whole_model": "off"},
}
WHOLE = b"# @package _global_\n"
INDEX = "model.safetensors.index.json"
CASES = settings(max_examples=settings().max_examples * 2 // 5)
"""Each is a command line, from its words to its plan: a tenth of a second."""


class World:
    """A tiny model, an adapter, a run and a preset; what is broken in it is mended again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_checkpoint(
            folder / "model", n_shared_experts=1, rope_scaling={"type": "yarn", "factor": 2.0}
        )
        self.adapter = write_adapter(folder / "west", rank_pattern={"layers.1": 2}, alpha_pattern={"layers.1": 4})
        self.presets = folder / "presets"
        self.preset = self.presets / "server" / "own.yaml"
        self.preset.parent.mkdir(parents=True)
        self.run = folder / "runs" / "20260101-000000-tiny"
        self.run.mkdir(parents=True)
        self._fill()

    def _fill(self) -> None:
        from safetensors import safe_open

        with safe_open(self.model / "model.safetensors", "np") as file:
            places = dict.fromkeys(file.keys(), "model.safetensors")
        (self.model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        code, out, err = called("action=plan", "format=json", *self.words)
        assert code == 0, err
        (self.run / "plan.json").write_text(out)
        mark = {"pid": 1, "born": 0.0}
        state = {"state": "ready", "launcher": mark, "url": "http://127.0.0.1:1", "server": mark, "attempts": []}
        attempt = {"started_at": 1.0, "ready_after_s": 2.0, "ending": "exit code 1", "cause": "x"}
        (self.run / "state.json").write_text(json.dumps(state | {"attempts": [attempt]}))
        (self.run / "timings.json").write_text(json.dumps({"ready": 1.0}))
        (self.run / "lock.json").write_text(json.dumps({"environment": {"A": "b"}, "files": {"x": "sha256:1"}}))
        self.preset.write_bytes(WHOLE + yaml.safe_dump(PRESET).encode())

    @property
    def words(self) -> list[str]:
        return ["server.device=cpu", "model=auto", f"model.path={self.model}", f"lora.path={self.adapter}"]

    def cases(self) -> dict[Path, list[list[str]]]:
        """File -> the command lines that read it."""
        plan, runs = ["action=plan", *self.words], f"paths.runs={self.run.parent}"
        inspect = ["action=inspect", *self.words]
        run = [["action=status", runs], ["action=runs", runs], ["action=diff", runs, f"runs=[{self.run},{self.run}]"]]
        run += [["action=logs", runs], ["action=status", runs, "format=json"]]
        return {
            self.model / "config.json": [plan, inspect],
            self.model / INDEX: [plan],
            self.adapter / "adapter_config.json": [plan, inspect],
            self.run / "plan.json": run,
            self.run / "state.json": run[:2],
            self.run / "timings.json": run[1:2],
            self.run / "lock.json": run[2:3],
            self.preset: [["--config-dir", str(self.presets), "server=own", *plan]],
        }


def called(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Once a plan was made of it: what that imports is no file's fault."""
    made = World(tmp_path_factory.mktemp("world"))
    assert called("action=plan", "model=auto", f"model.path={made.model}", "server.device=cpu")[0] == 0
    return made


def holds(argv: list[str]) -> None:
    """An answer or mistakes in lines of their own, in little time and memory, and nothing that a terminal acts on."""
    began_s, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, err = called(*argv)
    took_s = time.process_time() - began_s
    assert code in (0, 2, 3), err
    assert took_s < MOST_S, f"{took_s:.1f} s"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    assert "Traceback" not in err
    assert all(line.startswith(("error: ", "warning: ", "note: ")) for line in err.splitlines()), err
    for text in (out, err):
        strange = {character for character in text if character != "\n" and not character.isprintable()}
        assert not strange, ascii(strange)


def broken(world: World, file: Path, content: bytes, argv: list[str]) -> None:
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        holds(argv)
    finally:
        file.write_bytes(kept)


@CASES
@given(st.integers(0, 1 << 60))
def test_whatever_a_file_holds(world: World, seed: int) -> None:
    rng = Random(seed)
    file, lines = rng.choice(list(world.cases().items()))
    kept = file.read_bytes()
    content = damage(kept, rng) if rng.random() < 0.2 else as_json(mutate(yaml.safe_load(kept), rng))
    broken(world, file, WHOLE + content if file == world.preset else content, rng.choice(lines))


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_yaml_that_is_no_preset(document: bytes, world: World) -> None:
    broken(world, world.preset, document, world.cases()[world.preset][0])


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_yaml_that_is_no_config(document: bytes, world: World, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(document)
    holds(["--config", str(file), "action=plan", *world.words])


ROW = {"number": 0, "overrides": ["kt.cpuinfer=1"], "state": "ok", "exit_code": 0, "action": "plan", "objective": None}
ROWS: list[bytes] = [
    *(json.dumps({key: value for key, value in ROW.items() if key != left_out}).encode() for left_out in ROW),
    *(json.dumps({**ROW, key: json.loads(value)}).encode() for key in ROW for value in ("{}", "[[]]", '"x"', "1e400")),
    json.dumps({**ROW, "loads": [{}]}).encode(),
    json.dumps({**ROW, "action": "bench", "loads": 5, "memory": [], "start": "x"}).encode(),
    *(b"", b"[", b"\xff\xfe", b"[" * 100_000, b"5"),
]


def test_rows_that_no_sweep_has_written(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    file = folder / "rows" / "0000-0123456789abcdef.json"
    file.parent.mkdir(parents=True)
    argv = ["-m", "action=plan", "kt.cpuinfer=1", f"sweep.folder={folder}", *world.words]
    for content in ROWS:
        file.write_bytes(content)
        code, _, err = called(*argv)
        assert code in (0, 2, 3), err
        assert "Traceback" not in err


def test_what_stands_in_the_place_of_a_file_is_told(world: World, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "sweep.json").mkdir(parents=True)
    code, _, err = called("-m", "action=plan", "kt.cpuinfer=1", f"sweep.folder={tmp_path / 'sweep'}", *world.words)
    assert (code, err.splitlines()[-1].startswith("error: ")) == (2, True), err
    assert "is a folder, and a file is expected" in err


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but at most 10000 is expected"),
        ({"n_routed_experts": 10**12}, "n_routed_experts is 1000000000000, but a whole number from 0 to"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace is '1', but a whole number"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq is [1], but a whole number"),
        ({"architectures": "x"}, "architectures is 'x', but a list of names is expected"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', but an object is expected"),
        ({"rope_scaling": {"factor": float("inf")}}, "rope_scaling.factor is inf, but a number from 0 to"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type is 3, but a name is expected"),
        ({"model_type": ["mixtral"]}, "has model_type ['mixtral'], which is not a supported"),
    ],
)
def test_what_config_json_cannot_say(changes: dict[str, Any], mistake: str, world: World) -> None:
    file = world.model / "config.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | changes))
    try:
        code, _, err = called("action=plan", *world.words)
    finally:
        file.write_text(kept)
    assert code == 2
    assert mistake in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_on(name: str, world: World) -> None:
    file = (world.adapter if name.startswith("adapter") else world.model) / name
    kept = file.rename(file.with_name(f"{name}.kept"))
    os.mkfifo(file)
    try:
        code, _, err = called("action=plan", *world.words)
    finally:
        kept.replace(file)
    assert code == 2
    assert str(file.parent) in err


def test_names_reach_a_terminal_as_one_line(world: World, tmp_path: Path) -> None:
    folder = tmp_path / f"a{TERMINAL.replace(chr(0), '')}"
    folder.mkdir()
    code, _, err = called("action=plan", *world.words[:2], f"model.path='{folder}'")
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert "\\x1b[2J" in err and "\\u202e" in err and "\\r\\nerror: forged" in err
    assert err.rstrip("\n").isprintable()


def test_tables_and_lines_let_nothing_through(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("what",), [(TERMINAL,)])
    print_mistakes(LaunchError(TERMINAL, TERMINAL, TERMINAL))
    say(f"\n{TERMINAL}")
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert all(character == "\n" or character.isprintable() for character in captured.out + captured.err)


def test_json_that_is_read_back_holds_what_was_said() -> None:
    for text in ("Zürich 東京", TERMINAL, "\ud800"):
        written = readable_json({"a": text}, None)
        assert json.loads(written) == {"a": text}
        written.encode()
        assert written.isprintable()
    assert "東京" in readable_json("東京", None)
