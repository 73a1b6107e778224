"""The first hour as a newcomer has it, on a fresh machine: a clone, own model and adapter, a server that stays,
mistakes, a replay, other formats, a config carried to another machine. Runs every command in a shell with a HOME of its
own, times it, and writes docs/first-hour.md.

    python demo/first_hour.py [--installed] [--page FILE]

--installed leaves out the clone and takes the kt-launch beside this Python. A fresh HOME stands for a fresh machine;
the second machine has another HOME and other folders, and shares the installation. pip's configuration is kept.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is the capital of France?"
ASK = f"echo '{QUESTION}' | kt-launch chat"
OWN = "model=~/models/mine lora=~/adapters/west"
WIDTH, LONGEST = 118, 12
"""Columns of the page, and lines of a command's output that it shows; what is above its last ones is left out."""
PORT = "30000"
"""As it is typed; a free one in its place while the steps run."""
DULL = re.compile(r"^ +[\d.]+ s  |^make\[|^$|UserWarning|warnings\.warn|^WARNING: Location")
SENTENCE = re.compile(r"(?:error|warning|proof|kt-launch): ")
"""Lines that are wrapped where they are too long for the page; others, such as tables, are cut."""
CLIENT = f"""\
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:{PORT}/v1", api_key="none")
for name in ("mine", "mine:west"):
    question = {{"role": "user", "content": "{QUESTION}"}}
    answer = client.chat.completions.create(model=name, messages=[question], temperature=0)
    print(name, "|", answer.choices[0].message.content)
"""


@dataclass(frozen=True)
class Step:
    """title; commands as they are typed on `machine`; fails: those that are to say what is wrong; note: the text
    below."""

    title: str
    machine: str
    commands: tuple[str, ...]
    fails: tuple[int, ...] = ()
    note: str = ""


CLONE = Step("Clone to first answer", "first", ("git clone REPOSITORY kt-launch", "cd kt-launch", "make demo"))
STEPS = (
    CLONE,
    Step(
        "Own model and adapter to first answer",
        "first",
        (
            "export PATH=~/kt-launch/.venv/bin:$PATH",
            "kt-launch doctor",
            f"kt-launch inspect {OWN}",
            f"kt-launch plan {OWN}",
            f"{ASK} {OWN} chat.adapter=west chat.temperature=0",
        ),
    ),
    Step(
        "A server that stays, and its clients",
        "first",
        (
            f"kt-launch {OWN} server.port={PORT} detach=true",
            "cat ask.py",
            "python ask.py",
            "kt-launch adapters adapters.load.chef=~/adapters/chef",
            "kt-launch stop",
        ),
    ),
    Step(
        "Mistakes",
        "first",
        (
            "kt-launch model=~/models/mine lora=~/adapters/wset",
            f"kt-launch model=~/models/mine server.prot={PORT}",
            "kt-launch quantise model=~/models/mine",
        ),
        fails=(0, 1, 2),
        note="Nothing was started; each ended with exit code 2.",
    ),
    Step(
        "The same run again",
        "first",
        ("kt-launch replay detach=true", "kt-launch stop", "kt-launch runs"),
    ),
    Step(
        "Other formats",
        "first",
        (
            "kt-launch quantize model=~/models/mine kt.method=int8",
            f"kt-launch merge {OWN} merge.path=~/models/merged",
            f"kt-launch bench -m {OWN} kt.method=bf16,int8,int4 kt.prepare=true bench.concurrency=[1,4]",
        ),
    ),
    Step(
        "A config to keep",
        "first",
        (f"kt-launch config {OWN} chat.adapter=west chat.temperature=0 > run.yaml", "cat run.yaml"),
    ),
    Step(
        "The same on a second machine, with other folders",
        "second",
        (
            "kt-launch plan --config run.yaml",
            f"{ASK} --config run.yaml model=~/elsewhere/mine lora=~/elsewhere/west",
        ),
        fails=(0,),
        note="The first command says what does not fit here; the second one names the folders that are meant. Both "
        "machines give the same answer.",
    ),
)


@dataclass
class Done:
    """A command that ran."""

    command: str
    seconds: float
    lines: list[str] = field(default_factory=list)


class Machine:
    """A shell with a HOME that holds nothing."""

    def __init__(self, home: Path, path: str) -> None:
        self.home = home
        home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KT_LAUNCH_", "XDG_"))}
        self.env = {**kept, "HOME": str(home), "PATH": path, "PYTHONWARNINGS": "ignore"}
        pip = Path.home() / ".config" / "pip" / "pip.conf"
        if pip.is_file():
            self.env.setdefault("PIP_CONFIG_FILE", str(pip))
        self.folder = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def run(self, command: str, repository: str, fails: bool) -> Done:
        """Raises SystemExit with its output where it does not end as it should."""
        if command.startswith("cd "):
            self.folder = self.folder / command.removeprefix("cd ")
            return Done(command, 0.0)
        if command.startswith("export PATH="):
            self.env["PATH"] = f"{self.home}/kt-launch/.venv/bin:{self.env['PATH']}"
            return Done(command, 0.0)
        typed = command.replace("REPOSITORY", repository).replace(PORT, self.port)
        began = time.monotonic()
        ran = subprocess.run(
            ["bash", "-c", typed],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        done = Done(command, time.monotonic() - began, re.sub(rf"\b{self.port}\b", PORT, ran.stdout).splitlines())
        if (ran.returncode != 0) != fails:
            raise SystemExit(f"{command}: exit code {ran.returncode}\n{ran.stdout}")
        return done


def walk(root: Path, repository: str, installed: bool) -> list[tuple[Step, list[Done]]]:
    """Every step, on its machine."""
    path = os.environ["PATH"]
    bin_folder = Path(sys.executable).parent
    first = Machine(root / "first", f"{bin_folder}:{path}" if installed else path)
    walked = []
    for step in STEPS:
        if step.machine == "second" and not any(one.machine == "second" for one, _ in walked):
            second = carry(root, first)
        if installed and step is CLONE:
            continue
        machine = first if step.machine == "first" else second
        machine.folder = machine.home
        if machine is first:
            prepare(first)
        done = [machine.run(text, repository, number in step.fails) for number, text in enumerate(step.commands)]
        walked.append((step, done))
    require_same(walked)
    return walked


def prepare(machine: Machine) -> None:
    """A model and adapters of one's own, the demo's files below other names, and a client."""
    for name, own in (("model", "models/mine"), ("west", "adapters/west"), ("west", "adapters/chef")):
        if not (machine.home / own).exists():
            shutil.copytree(ROOT / "demo" / name, machine.home / own)
    (machine.home / "ask.py").write_text(CLIENT.replace(PORT, machine.port), encoding="utf-8")


def carry(root: Path, first: Machine) -> Machine:
    """The second machine: the config, the model and the adapter arrive there, in other folders."""
    second = Machine(root / "second" / "home", first.env["PATH"])
    for own in ("models/mine", "adapters/west"):
        shutil.copytree(first.home / own, second.home / "elsewhere" / Path(own).name)
        shutil.move(first.home / own, root / f"not-there-{Path(own).name}")
    shutil.copy(first.home / "run.yaml", second.home)
    return second


def require_same(walked: list[tuple[Step, list[Done]]]) -> None:
    """The answers of both machines."""
    said = [line for _, ran in walked for done in ran if done.command.startswith(ASK) for line in done.lines]
    answers = [line for line in said if "Paris" in line]
    if len(answers) != 2 or len(set(answers)) != 1:
        raise SystemExit(f"the answers differ: {answers}")


def page(walked: list[tuple[Step, list[Done]]], root: Path) -> str:
    """docs/first-hour.md."""
    rows = [f"| {step.title} | {len(ran)} | {sum(done.seconds for done in ran):.0f} |" for step, ran in walked]
    cores = len(os.sched_getaffinity(0))
    parts = [
        "# The first hour",
        "<!-- Written by `python demo/first_hour.py`. -->",
        wrapped(
            f"Each step as it was typed on a machine with nothing on it but Python {sys.version_info.major}."
            f"{sys.version_info.minor}, a compiler, git and make ({cores} cores, no GPU, other work beside it); "
            "seconds are those of the wall clock. The first step downloads torch and SGLang and compiles the kernels; "
            "each answer starts a server, proves it, and ends it."
        ),
        "\n".join(["| step | commands | seconds |", "| --- | --- | --- |", *rows]),
    ]
    for step, ran in walked:
        parts += [f"## {step.title}", "\n".join(["```text", *transcript(ran, root), "```"])]
        parts += [wrapped(step.note)] if step.note else []
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def transcript(ran: list[Done], root: Path) -> Iterator[str]:
    """Commands and the last lines of what they said, with paths as the reader has them."""
    for done in ran:
        yield f"$ {done.command.replace('REPOSITORY', '<URL of this repository>')}"
        lines = [line for line in done.lines if not DULL.search(line)]
        if len(lines) > LONGEST:
            yield f"… {len(lines) - LONGEST} line{'s' if len(lines) > LONGEST + 1 else ''}"
        for line in lines[-LONGEST:]:
            yield from shown(line, root)


def shown(line: str, root: Path) -> list[str]:
    """Without the folder that stands for the machines, and no wider than the page."""
    for folder in (root / "second" / "home", root / "first"):
        line = re.sub(rf"{re.escape(str(folder))}([^\s\"]*  +(?=\S))?", partial(_at_home, len(str(folder))), line)
    line = re.sub(r"\033\[[0-9;]*m", "", line).replace(str(root), "")
    if label := SENTENCE.match(line):
        return textwrap.wrap(line, WIDTH, subsequent_indent=" " * len(label[0]), break_on_hyphens=False)
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"]


def _at_home(length: int, found: re.Match[str]) -> str:
    """A path in a table leaves its column as wide as it was."""
    rest: str | None = found[1]
    return f"~{rest}{' ' * (length - 1)}" if rest else "~"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--installed", action="store_true", help="leave the clone out")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "first-hour.md")
    parser.add_argument("--repository", default=str(ROOT))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-hour-") as folder:
        root = Path(folder).resolve()
        walked = walk(root, options.repository, options.installed)
        options.page.write_text(page(walked, root), encoding="utf-8")
        print(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
