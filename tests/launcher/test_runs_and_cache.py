"""KT_LAUNCH_RUNS, KT_LAUNCH_CACHE, paths.runs: values that can be no folder are one line, whatever is done."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import Config
from kt_launch.doctor import run_check

Launch = Callable[..., Any]
VARIABLES = ("KT_LAUNCH_RUNS", "KT_LAUNCH_CACHE")
PLAIN = sorted(set(ACTIONS) - {"doctor"})
IMPOSSIBLE = {
    "file": "{0} is a file, but a folder is expected",
    "file/below": "{0} cannot be made, since {1}/file is a file, but a folder is expected",
    "broken": "{0} is a broken link",
    "broken/below": "{0} cannot be made, since {1}/broken is a broken link",
    "endless": "{0} is a broken link",
    "to a file": "{0} is a file, but a folder is expected",
    "~no such user/x": "~no such user/x names the home of an unknown user",
    "fi\x1b[31mle": "{1}/fi\\x1b[31mle is a file, but a folder is expected",
    "a" * 256: "a name in {0} has more than 255 bytes",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what is none in it."""
    (tmp_path / "file").touch()
    (tmp_path / "fi\x1b[31mle").touch()
    for name, target in ("broken", "/nowhere/at all"), ("endless", "endless"), ("to a file", "file"):
        (tmp_path / name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_can_be_no_folder_is_one_line(
    launch: Launch, place: Path, monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    value = name if name.startswith("~") else str(place / name)
    monkeypatch.setenv(variable, value)
    told = f"error: {variable}: {IMPOSSIBLE[name].format(value, place)}. Set {variable}=/path/to/folder.\n"
    for action in ("runs", "cache"):
        ended = launch(action)
        assert (ended.code, ended.out, ended.err) == (2, "", told)


@pytest.mark.parametrize("action", PLAIN)
def test_whatever_is_done(launch: Launch, place: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """Both at once, and before anything is read, written or started."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(place / "file"))
    ended = launch(action)
    told = [f"error: {each}: {place}/file is a file, but a folder is expected. Set" for each in VARIABLES]
    assert ended.code == 2
    assert [line.partition(" Set ")[0] + " Set" for line in ended.err.splitlines() if "KT_LAUNCH" in line] == told
    assert "Traceback" not in ended.err and (place / "file").read_bytes() == b""


def test_the_typed_folder_goes_before_the_variable(
    launch: Launch, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(place / "file"))
    assert launch("runs", f"paths.runs={place}/runs").code == 0
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(place / "runs"))
    ended = launch("runs", f"paths.runs={place}/broken")
    told = f"error: paths.runs: {place}/broken is a broken link. Set paths.runs=/path/to/folder.\n"
    assert (ended.code, ended.err) == (2, told)


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_doctor_finds_it(place: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, str(place / "file"))
    for check in "check_disk", "check_permissions":
        found = run_check(f"kt_launch.doctor.ports_and_folders:{check}", Config())
        detail = f"{variable}: {place}/file is a file, but a folder is expected"
        assert (found.status, found.detail, found.fix) == ("fail", detail, f"Set {variable}=/path/to/folder.")


@pytest.mark.parametrize("value", ["", "{0}/new", "{0}/new/below", "new", "{0}/link"])
def test_what_can_be_a_folder_is_none_to_complain_of(
    launch: Launch, place: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Empty is not set, a relative one is below the working folder, and a link may lead to a folder."""
    (place / "link").symlink_to(place)
    monkeypatch.setenv("HOME", str(place))
    for each in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(each, raising=False)
    for variable, action in zip(VARIABLES, ("runs", "cache"), strict=True):
        monkeypatch.setenv(variable, value.format(place))
        ended = launch(action)
        assert (ended.code, ended.err) == (0, ""), ended.err
        assert (str(Path(value.format(place)).absolute()) if value else f"{place}/.") in ended.out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, and may read everything")
def test_a_folder_that_this_user_may_not_read_is_told() -> None:
    code = (
        "import os, sys\n"
        "from kt_launch.machine.folders import require_possible\n"
        "from kt_model.errors import LaunchError\n"
        "os.setgroups([]); os.setgid(54322); os.setuid(54322)\n"
        "for text in sys.argv[1:]:\n"
        "    try: print(require_possible(text, 'KT_LAUNCH_RUNS'))\n"
        "    except LaunchError as told: print(told)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        closed = Path(name)
        closed.chmod(0o711)
        inner = closed / "inner"
        inner.mkdir(mode=0o700)
        (closed / "link").symlink_to(inner / "folder")
        words = [str(closed), str(inner / "below"), str(closed / "new"), str(closed / "link")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        f"KT_LAUNCH_RUNS: this user may not read {closed}. Set KT_LAUNCH_RUNS=/path/to/folder.",
        f"KT_LAUNCH_RUNS: this user may not read {inner}. Set KT_LAUNCH_RUNS=/path/to/folder.",
        str(closed / "new"),
        f"KT_LAUNCH_RUNS: this user may not read {closed}/link. Set KT_LAUNCH_RUNS=/path/to/folder.",
    ], done.stderr
