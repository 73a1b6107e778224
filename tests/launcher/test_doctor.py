"""action=doctor: the checks pass where things are right, and each finds what it is there for."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT
from machines import AMX, AVX512, GIB, Machine

from kt_launch import doctor
from kt_launch.config.schema import Config, Paths, Server
from kt_launch.doctor import environment, kernels, machine, ports_and_folders, run_check
from kt_launch.machine.host import Host, read_host
from kt_model.installed import sglang_requirement
from kt_model.methods import METHODS
from kt_sglang.seam_check import class_mistakes

Launch = Callable[..., Any]
PLACES = ("launcher", "plugins", "requirements", "docs")
BOTH = ["avx512", "avx512_bf16"]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return read_host(Machine(cores=8).write(tmp_path / "machine"))


def test_json_is_an_array_alone_on_stdout(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = tuple(row for row in doctor.CHECKS if "machine" in row[1])
    monkeypatch.setattr(doctor, "CHECKS", fast)
    own = doctor.CHECKS_OF_CONFIG
    made = launch("action=doctor", "format=json")
    found = json.loads(made.out)
    assert [row["check"] for row in found] == [name for name, _ in fast + own]
    assert all(set(row) == {"check", "status", "detail", "fix"} for row in found)
    assert [row for row in found if row["status"] != "pass" and not row["fix"]] == []
    assert made.code == (1 if any(row["status"] == "fail" for row in found) else 0)


def test_a_failing_check_is_shown_and_makes_the_exit_code(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (("broken", "kt_launch.doctor.machine:no_such_check"),))
    made = launch("action=doctor")
    assert made.code == 1
    assert "the check itself failed" in made.out


def test_the_check_that_runs_is_shown_on_a_terminal_and_nothing_in_a_pipe(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (("python", "kt_launch.doctor.environment:check_python"),))
    monkeypatch.setattr(doctor, "CHECKS_OF_CONFIG", (("disk", "kt_launch.doctor.ports_and_folders:check_disk"),))
    piped = launch("doctor")
    assert piped.err == "" and "python" in piped.out
    monkeypatch.setenv("TERM", "xterm")
    screen, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert "disk" in launch("doctor").out
        shown = os.read(screen, 1 << 16).decode()
    os.close(screen)
    assert "checking: disk" in shown
    assert shown.endswith("\033[2K"), "the line stays"


def test_every_row_names_a_function_there_is() -> None:
    import importlib

    for _, path in doctor.CHECKS + doctor.CHECKS_OF_CONFIG:
        module, _, function = path.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_machine_checks_of_this_very_machine_do_not_fail() -> None:
    rows = [path for _, path in doctor.CHECKS if "machine" in path]
    assert [path for path in rows if run_check(path).status == "fail"] == []
    assert [path for _, path in doctor.CHECKS_OF_CONFIG if run_check(path, Config()).status == "fail"] == []


def test_the_version_of_sglang_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pyproject.toml, from where the others have it; and the installed one is that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["gpu"] == [sglang_requirement()]
    others = [ROOT / "Makefile", *(file for folder in PLACES for file in (ROOT / folder).rglob("*.*"))]
    texts = [file for file in others if file.suffix in ("", ".py", ".md", ".txt")]
    assert [file for file in texts if re.search(r"sglang==\d", file.read_text())] == []
    assert environment.check_sglang().status == "pass"
    monkeypatch.setattr(environment, "version_of", {"sglang": "0.4.0"}.get)
    found = environment.check_sglang()
    assert (found.status, sglang_requirement() in found.fix) == ("warn", True)


REPORTS = {
    "sound": ({"seams": 7, "not_imported": [], "mistakes": []}, "", "pass", "all 7 SGLang hooks match"),
    "moved": (
        {"seams": 7, "not_imported": [], "mistakes": ["a is gone", "b takes (x)"]},
        "",
        "fail",
        "a is gone; b tak",
    ),
    "not there": (
        {"seams": 0, "not_imported": ["no x"], "mistakes": []},
        "",
        "fail",
        "SGLang cannot be imported: no x",
    ),
    "ended": (None, "ModuleNotFoundError: No module named 'x'", "fail", "the plugin cannot be loaded: ModuleNotF"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_what_a_look_at_sglang_finds_is_told(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that says it; tests/plugin/test_seams.py has the look itself."""
    report, errors, status, told = REPORTS[case]
    look = tmp_path / "python"
    code = (
        f"import sys; sys.exit({errors!r})"
        if report is None
        else f"print('SGLang says'); print({json.dumps(report)!r})"
    )
    look.write_text(f"#!{sys.executable}\n{code}\n")
    look.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(look))
    found = environment.check_seams()
    assert found.status == status and found.detail.startswith(told) and bool(found.fix) == (status == "fail"), found


def test_what_sglang_may_not_do_is_no_reason_to_install_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = tmp_path / "python"
    look.write_text(f"#!{sys.executable}\nopen('/proc/none/x', 'w')\n")
    look.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(look))
    found = environment.check_seams()
    assert "FileNotFoundError" in found.detail and "HOME" in found.fix and "pip install" not in found.fix


@pytest.mark.nightly
@pytest.mark.parametrize("home", ["", "/proc"])
def test_the_installed_sglang_has_every_seam(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody can write into the home folder: a server starts there, too."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    found = environment.check_seams()
    assert (found.status, found.detail) == ("pass", found.detail), found
    assert "SGLang hooks match" in found.detail


class Theirs:
    def run(self, layer: object, batch: object) -> None: ...

    def renamed(self, layer: object) -> None: ...

    def grown(self, layer: object, extra: object = None) -> None: ...


class Ours:
    def run(self, layer: object, batch: object, **more: object) -> None: ...

    def renamed(self, block: object) -> None: ...

    def grown(self, layer: object) -> None: ...


def test_a_moved_signature_is_named() -> None:
    said = list(class_mistakes("sglang.x.Theirs", Theirs, Ours))
    assert [line.split(" takes ")[0] for line in said] == ["sglang.x.Theirs.renamed", "sglang.x.Theirs.grown"]


def test_the_kernels_of_this_machine_compute_what_the_definition_says() -> None:
    pytest.importorskip("kt_kernels._core")
    found = kernels.check_forward()
    assert found.status == "pass", found
    assert all(method in found.detail for method in METHODS)
    assert "reference" in found.detail


def test_a_kernel_that_computes_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kt_kernels._core")
    monkeypatch.setattr(kernels, "METHODS", {**METHODS, "int8": replace(METHODS["int8"], doctor_limit=0.0)})
    found = kernels.check_forward()
    assert found.status == "fail"
    assert "Do not serve with int8 on" in found.fix and "bf16 on" not in found.fix


@pytest.mark.parametrize(
    ("flags", "built", "usable", "status", "said", "fix"),
    [
        (AVX512, [*BOTH, "avx2"], [*BOTH, "avx2"], "pass", "avx512 of avx512, avx512_bf16, avx2", ""),
        (AVX512, [*BOTH, "avx2"], [*BOTH[::-1], "avx2"], "pass", "avx512_bf16 of avx512_bf16, avx512, avx2", ""),
        (
            AMX,
            BOTH,
            BOTH,
            "warn",
            "the CPU has amx, but the wheel has no kernels for it; avx512 is used",
            "Build the wheel",
        ),
        (AMX, ["amx", *BOTH], BOTH, "warn", "the CPU has amx, but the system does not permit it", "Linux 5.16"),
        (AVX512, [*BOTH, "avx2"], ["avx2"], "warn", "the CPU has avx512_bf16", "does not permit avx512_bf16"),
        ("avx2 fma", [*BOTH, "avx2"], ["avx2"], "pass", "avx2 of avx2", ""),
        ("sse2", ["avx512"], [], "fail", "none of avx512 runs on Test CPU", "Build the wheel"),
    ],
)
def test_the_wheel_against_the_cpu(
    flags: str, built: list[str], usable: list[str], status: str, said: str, fix: str, tmp_path: Path
) -> None:
    found = kernels.compare_instruction_sets(read_host(Machine(flags=flags).write(tmp_path)), built, usable)
    assert found.status == status
    assert said in found.detail
    assert fix in found.fix and bool(fix) == bool(found.fix)


def test_half_a_cpu_is_warned_of(host: Host) -> None:
    assert machine.describe_cpu(replace(host, quota_cpus=0.5)).status == "warn"
    assert machine.describe_cpu(host).status == "pass"


LITTLE: dict[str, tuple[dict[str, Any], str]] = {
    "a small limit": ({"memory_limit_bytes": 2 * GIB, "memory_left_bytes": 2 * GIB}, "2.0 of 2.0 GiB left"),
    "a limit that others use up": ({"memory_limit_bytes": 8 * GIB, "memory_left_bytes": GIB}, "1.0 of 8.0 GiB left"),
    "a full machine": ({"available_bytes": GIB}, "1.0 of 64.0 GiB available"),
}


@pytest.mark.parametrize("kind", LITTLE)
def test_little_memory_is_warned_of(kind: str, host: Host) -> None:
    assert machine.describe_memory(host).status == "pass"
    changes, message = LITTLE[kind]
    found = machine.describe_memory(replace(host, **changes))
    assert found.status == "warn"
    assert message in found.detail


def test_huge_pages_that_are_off_are_warned_of(host: Host) -> None:
    assert machine.describe_huge_pages(host).status == "pass"
    assert "echo madvise" in machine.describe_huge_pages(replace(host, huge_pages="never")).fix


@pytest.mark.parametrize(("variable", "status"), [("RUNS", "fail"), ("CACHE", "warn")])
def test_a_folder_that_cannot_be_written(
    variable: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody makes a folder below /proc, root neither."""
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(tmp_path))
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path))
    monkeypatch.setenv(f"KT_LAUNCH_{variable}", "/proc/kt-launch")
    found = ports_and_folders.check_permissions(Config())
    assert found.status == status
    assert found.detail == "cannot write into /proc/kt-launch (No such file or directory)"
    assert f"Set KT_LAUNCH_{variable}" in found.fix


def test_folders_and_ports_are_those_that_are_typed(tmp_path: Path, busy_port: int) -> None:
    config = Config(paths=Paths(runs=str(tmp_path)), server=Server(port=busy_port))
    assert f"GiB free for runs in {tmp_path} (disk: " in ports_and_folders.check_disk(config).detail
    found = ports_and_folders.check_ports(config)
    assert (found.status, found.fix) == ("fail", "Stop it, or set server.port=0 for a free port.")
    assert found.detail.startswith(f"server.port: {busy_port} on 127.0.0.1 cannot be used: process ")
    found = ports_and_folders.check_ports(Config(server=Server(metrics_port=busy_port)))
    assert found.detail.startswith(f"server.metrics_port: {busy_port} on ")
    assert ports_and_folders.check_ports(Config()).status == "pass"


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert environment.check_python().status == "fail"


def test_copying_is_measured_in_bytes_a_second() -> None:
    assert 1e8 < machine.measure_copy(1) < 1e13
