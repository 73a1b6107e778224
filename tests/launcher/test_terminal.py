"""What a terminal of 80 columns shows: no line is longer, no column a sliver, and NO_COLOR is respected."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from kt_launch.commandline.help import EXAMPLES
from kt_launch.commandline.terminal import folded, print_table
from kt_model.printable import under_label

WIDTH = 80


def on_terminal(*words: str, folder: Path, **env: str) -> str:
    """What kt-launch writes on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "KT_LAUNCH_RUNS": str(folder / "runs"), **env}
    command = [sys.executable, "-P", "-m", "kt_launch.cli", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            if not (piece := os.read(ours, 1 << 16)):
                break
        except OSError:  # the other side is closed
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "action", ["plan", "explain", "explain kt.cpuinfer", "inspect", "fit", "help", "help serve", "help cache"]
)
def test_no_line_is_longer_than_the_terminal(action: str, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    launch = [] if action.startswith("help") else [f"model={checkpoint}", f"lora={adapter}", "server=cpu"]
    launch += ["fit.host=amx"] if action == "fit" else []
    shown = on_terminal(*action.split(), *launch, folder=tmp_path).replace("\033[1m", "").replace("\033[0m", "")
    lines = [line for line in shown.splitlines() if "-m kt_sglang.server" not in line and "kt-launch " not in line]
    assert len(lines) > 5
    assert [line for line in lines if len(line) > WIDTH and str(tmp_path.parent.parent) not in line] == []


def test_bold_headings_unless_no_colour_is_wanted(tmp_path: Path, checkpoint: Path) -> None:
    words = ("plan", f"model={checkpoint}", "server=cpu")
    assert "\033[1mkey " in on_terminal(*words, folder=tmp_path)
    assert "\033" not in on_terminal(*words, folder=tmp_path, NO_COLOR="1")
    assert "\033" not in on_terminal(*words, folder=tmp_path, TERM="dumb")


def test_columns_that_would_be_slivers_become_paragraphs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_launch.commandline.terminal._columns", lambda without: 40)
    long = "words of an explanation that goes on and on over more than a few lines of it"
    print_table(("key", "value", "meaning"), [("server.max_running_requests", "4", long)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        "server.max_running_requests",
        "  value    4",
        "  meaning  words of an explanation that",
    ]
    assert shown[3].startswith("           goes on") and max(map(len, shown)) <= 40
    print_table(("name", "now", "ending", "of"), [("20261127-064042-demo", "ended", "exit code 130", "demo")])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
    names = ("SGLang itself", "routed experts", "rest of the model", "activations")
    print_table(("fit (GiB)", *names), [("host memory", "1.5", "2", "0.1", "0.2")])
    assert capsys.readouterr().out.splitlines()[:2] == ["host memory (GiB)", "  SGLang itself      1.5"]
    print_table(("key", "value"), [("a", "1"), ("b", "2")])
    assert capsys.readouterr().out.splitlines() == ["key  value", "a    1", "b    2"]


def test_a_page_is_folded_and_its_commands_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_launch.commandline.terminal._columns", lambda without: 40)
    page = (
        "  key          an explanation of some words that is long\n  kt-launch plan model=/some/where   what for it is"
    )
    assert folded(page).splitlines() == [
        "  key          an explanation of some",
        "               words that is long",
        "  kt-launch plan model=/some/where",
        "      what for it is",
    ]


def test_commands_of_one_block_have_what_they_are_for_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kt_launch.commandline.terminal._columns", lambda without: 44)
    page = "Examples:\n  kt-launch plan              for people\n  kt-launch plan --json       for programs of any kind"
    assert folded(page).splitlines() == [
        "Examples:",
        "  kt-launch plan",
        "      for people",
        "  kt-launch plan --json",
        "      for programs of any kind",
    ]
    assert folded(page.replace(" of any kind", "")).splitlines()[1] == "  kt-launch plan              for people"


def test_the_beginning_of_the_help_page_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = folded(EXAMPLES)
    assert [line for line in shown.splitlines() if len(line) > WIDTH] == []
    assert "\n  kt-launch chat                       talk to the server" in shown
    monkeypatch.setattr("kt_launch.commandline.terminal._columns", lambda without: 60)
    narrow = folded(EXAMPLES).splitlines()
    assert [line for line in narrow if len(line) > 60 and not line.startswith("  kt-launch")] == []
    assert max(map(len, narrow[:2])) > 50  # a sentence is wrapped once, not a wrapped one again


def test_a_path_is_broken_after_a_slash_and_a_list_after_a_comma(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kt_launch.commandline.terminal._columns", lambda without: 36)
    print_table(("key", "value"), [("model.path", "/models/of/somebody/DeepSeek-V2-Lite"), ("list", "a,b")])
    assert capsys.readouterr().out.splitlines() == [
        "key         value",
        "model.path  /models/of/somebody/",
        "            DeepSeek-V2-Lite",
        "list        a,b",
    ]
    print_table(("key", "value"), [("k" * 10, "probed: [down_proj,gate_proj,up_proj] and\nso on, or and/or")])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "kkkkkkkkkk  probed:",
        "            [down_proj,gate_proj,",
        "            up_proj] and",
        "            so on, or and/or",
    ]
    print_table(("key", "value"), [("k" * 10, "x" * 30)])
    assert capsys.readouterr().out.splitlines()[1:] == ["kkkkkkkkkk  " + "x" * 24, " " * 12 + "x" * 6]


def test_a_source_is_shown_without_the_folder_that_has_a_row(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    shown = on_terminal("plan", f"model={checkpoint}", f"lora={adapter}", "server=cpu", folder=tmp_path)
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert rows["model.num_experts"].endswith(" probed: config.json")
    assert "adapter_config.json" in shown and f"{adapter}/adapter_config.json" not in shown


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_was_proven_is_wrapped_on_a_terminal_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "proof: base reads: tokens of a shipped text are likelier at their own positions\n"
    assert under_label(line, Screen()).splitlines() == [
        "proof: base reads: tokens of a shipped",
        "       text are likelier at their own",
        "       positions",
    ]
    assert under_label(line, Screen()).endswith("positions\n")
    assert under_label(line, io.StringIO()) == line
    command = "chat:  kt-launch chat run=20261127-064042-with-a-long-name"
    assert under_label(command, Screen()) == command


@pytest.mark.parametrize(
    ("locale", "letters"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "‖ΔW‖ min".encode()),
        ({"PYTHONIOENCODING": "ascii"}, "‖ΔW‖ min".encode()),
        ({"PYTHONIOENCODING": "latin-1"}, rb"\u2016\u0394W\u2016 min"),
        ({"LC_ALL": "C"}, "‖ΔW‖ min".encode()),
    ],
)
def test_letters_that_a_locale_lacks_end_no_command(locale: dict[str, str], letters: bytes, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "kt_launch.cli", "inspect"]
    environment = {**os.environ, "KT_LAUNCH_RUNS": str(tmp_path), **locale}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert letters in done.stdout
