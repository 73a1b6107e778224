"""Terminal pictures for the pages: runs kt-launch for real and draws what it prints as SVG.

.venv/bin/python docs/pictures/make.py
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kt_launch.machine.folders import demo_folder

HERE = Path(__file__).parent
KT_LAUNCH = Path(sys.executable).with_name("kt-launch")
COLUMNS = 118
PICTURES = {
    "plan": "kt-launch plan model=~/models/demo lora=~/loras/west",
    "explain": "kt-launch explain kt.cpuinfer",
    "doctor": "kt-launch doctor",
    "inspect": "kt-launch inspect",
    "mistakes": "kt-launch modle=demo kt.cpuinfr=2 lora=demo_wets",
}


def read_terminal(command: str, home: Path) -> str:
    """What the command prints on a terminal of COLUMNS columns; folders of this machine get a reader's names."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KT_LAUNCH_")},
        "COLUMNS": str(COLUMNS), "HOME": str(home), "KT_LAUNCH_RUNS": str(home / "runs"),
    }  # fmt: skip
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(KT_LAUNCH), *command.split()[1:]], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env=environment, cwd=home,
    )  # fmt: skip
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        parts.append(part)
    process.wait()
    kept = b"".join(parts).rpartition(b"\033[2K")[2]  # a line that showed what the command was doing is gone
    return kept.decode().replace("\r\n", "\n")


def draw(name: str, command: str, printed: str) -> None:
    """One picture."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    console.print(Text.from_markup(f"[bold green]$[/] {command}"))
    console.print(Text.from_ansi(printed.rstrip("\n")), soft_wrap=False)
    console.print()  # the last line's underscores would be cut off
    console.save_svg(str(HERE / f"{name}.svg"), title="kt-launch", unique_id=f"kt-{name}")


def write_reader(home: Path) -> None:
    """The folders of a reader, whose paths are short enough to stay in one line."""
    for name, place in (("model", "models/demo"), ("west", "loras/west")):
        shutil.copytree(demo_folder(name), home / place)


def shorten(printed: str, home: str) -> str:
    """~ in the place of the home; a path in a table leaves the next column where it is."""
    spared = " " * (len(home) - 1)
    return re.sub(rf"{re.escape(home)}(\S*)(?=  )", rf"~\1{spared}", printed).replace(home, "~")


def main() -> None:
    installed = str(Path(__import__("kt_launch").__file__).parent)
    # A short folder instead of this machine's keeps the tables narrow and the pictures the same everywhere.
    with tempfile.TemporaryDirectory() as folder:
        write_reader(Path(folder))
        for name, command in PICTURES.items():
            printed = shorten(read_terminal(command, Path(folder)), folder).replace(sys.executable, "python")
            printed = printed.replace(installed, "…/kt_launch")
            assert ".venv" not in printed, f"{name}: a path of this machine is in the picture"
            draw(name, command, printed)
            print(f"{name}.svg: {len(printed.splitlines())} lines")


if __name__ == "__main__":
    main()
