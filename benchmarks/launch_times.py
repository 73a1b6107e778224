"""The launcher's own speed: a plan, a shell completion, and what it adds to the start of stock SGLang's server.

All of it is timed from outside, on the installed `kt-launch` and the shipped demo model.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from kt_model.plan import SERVER_COMMAND

KT_LAUNCH = Path(sys.executable).with_name("kt-launch")
STOCK = Path(__file__).with_name("stock_server.py")
START_LIMIT_S = 180.0
OURS_ONLY = {"--kt-weight-path", "--kt-method", "--kt-cpuinfer", "--kt-threadpool-count", "--kt-num-gpu-experts"}
HEAVY = ("torch", "sglang", "transformers")
# Prints what a plan imported; the plan itself goes to /dev/null.
PLAN_MODULES = """
import json, os, sys
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from kt_launch.cli import main
code = main(["action=plan"])
sys.stdout.flush()
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
os.write(said, json.dumps({"code": code, "modules": sorted(sys.modules), "files": [f for f in files if f]}).encode())
"""
COMPLETE = {
    "bash": (
        ["bash", "--norc", "-c"],
        'source "$1"; compopt() { :; }; COMP_LINE="kt-launch kt." COMP_POINT=13; _kt_launch; echo "${COMPREPLY[@]}"',
    ),
    "fish": (["fish", "--no-config", "-c"], 'source $argv[1]; complete -C"kt-launch kt."'),
}

Rows = list[dict[str, Any]]


def measure(starts: int = 3) -> Rows:
    """Rows with a `what` each; seconds."""
    return [*plan(), *completion(), *start(starts)]


def spread(what: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"what": what, "median_s": median, "quartiles_s": [low, high], "rounds": len(seconds), **more}


def timed(what: str, command: list[str], rounds: int, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Wall time of whole processes, with their CPU time, which other work on the machine hardly changes."""
    wall, cpu = [], []
    for _ in range(rounds):
        before()
        used, begun = children_cpu_s(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall.append(time.perf_counter() - begun)
        cpu.append(children_cpu_s() - used)
    return spread(what, wall, cpu_s=statistics.median(cpu))


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plan(rounds: int = 15) -> Rows:
    """`kt-launch plan` in a fresh process: with its files in the page cache, and after they were evicted."""
    command = [str(KT_LAUNCH), "action=plan"]
    alone = [sys.executable, "-P", "-c", PLAN_MODULES]
    printed = subprocess.run(alone, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    found = json.loads(printed)
    heavy = [name for name in HEAVY if name in found["modules"]]
    imported = {"modules": len(found["modules"]), "heavy_modules": heavy}

    def evict_all() -> None:
        for file in found["files"]:
            evict(Path(file))

    return [
        timed("plan, fresh process", command, rounds) | imported,
        timed("plan, files evicted from the page cache", command, 5, before=evict_all),
    ]


def evict(module: Path) -> None:
    """Drops a module's file and its bytecode from the page cache; what another process has mapped stays."""
    bytecode = module.parent / "__pycache__" / f"{module.stem}.{sys.implementation.cache_tag}.pyc"
    for file in (module, bytecode):
        with contextlib.suppress(OSError):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def completion(rounds: int = 15) -> Rows:
    """A whole shell that reads the completion script and completes `kt.`, so more than a key press costs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shell, (command, code) in COMPLETE.items():
            if shutil.which(shell) is None:
                continue
            script = Path(folder) / f"completion.{shell}"
            script.write_bytes(subprocess.check_output([str(KT_LAUNCH), "--completion", shell]))
            named = ["shell"] if shell == "bash" else []
            whole = [*command, code, *named, str(script)]
            offered = subprocess.check_output(whole, text=True, stderr=subprocess.DEVNULL).split()
            assert any(word.startswith("kt.method") for word in offered), f"{shell} offered {offered}"
            rows.append(timed(f"completion, {shell}", whole, rounds))
    return rows


class Started:
    """A server process in a session of its own; `wait` takes the seconds until its output says that it serves."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self.begun = time.perf_counter()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def wait(self, sign: str, also: Callable[[], None] = lambda: None) -> float:
        while sign not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.perf_counter() - self.begun > START_LIMIT_S:
                raise RuntimeError(f"the server did not start: …{self.log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.02)
        also()
        return time.perf_counter() - self.begun

    def cpu_s(self) -> float:
        """CPU time of all its processes so far: what other work on the machine hardly changes."""
        leader = psutil.Process(self.process.pid)
        total = 0.0
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                total += used.user + used.system
        return total

    def stop(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=8)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Started]:
    server = Started(command, environment, log)
    try:
        yield server
    finally:
        server.stop()


def planned(*overrides: str) -> dict[str, Any]:
    command = [str(KT_LAUNCH), "action=plan", "format=json", *overrides]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
    return found


def stock_start(folder: Path) -> tuple[float, float]:
    """Stock SGLang on the demo model without adapters, its own MoE code, the plan's arguments: until a token came."""
    plan = planned("lora=none")
    argv = plan["argv"][1 + len(SERVER_COMMAND) :]
    kept = [word for word, before in zip(argv, ["", *argv], strict=False) if not OURS_ONLY & {word, before}]
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}"
    with started([sys.executable, "-P", str(STOCK), *kept], plan["env"], folder / "stock.log") as server:
        return server.wait("ready to roll", also=lambda: one_token(url)), server.cpu_s()


def one_token(url: str) -> None:
    """The generation after which kt-launch, too, calls a server up."""
    import httpx

    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    httpx.post(f"{url}/generate", json=body, timeout=60.0, trust_env=False).raise_for_status()


def ours_start(folder: Path, *overrides: str) -> tuple[float, float]:
    """kt-launch from its exec until it says ready: plan, start, kt_kernels' experts, proof."""
    with started([str(KT_LAUNCH), *overrides], {"KT_LAUNCH_RUNS": str(folder / "runs")}, folder / "ours.log") as server:
        return server.wait("\nready: "), server.cpu_s()


def start(rounds: int) -> Rows:
    """In turns: stock, ours without and with an adapter. Beyond stock: the difference inside each round."""
    wall: dict[str, list[float]] = {"stock": [], "ours, no adapter": [], "ours, with adapter": []}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways: dict[str, Callable[[], tuple[float, float]]] = {
            "stock": lambda: stock_start(folder),
            "ours, no adapter": lambda: ours_start(folder, "lora=none"),
            "ours, with adapter": lambda: ours_start(folder),
        }
        for number in range(rounds):
            for way in list(ways) if number % 2 == 0 else reversed(ways):
                seconds, used = ways[way]()
                wall[way].append(seconds)
                cpu[way].append(used)
    rows = [spread(f"start, {way}", wall[way], cpu_s=statistics.median(cpu[way])) for way in wall]
    for way in ("ours, no adapter", "ours, with adapter"):
        beyond = [ours - stock for ours, stock in zip(wall[way], wall["stock"], strict=True)]
        used = statistics.median(ours - stock for ours, stock in zip(cpu[way], cpu["stock"], strict=True))
        rows.append(spread(f"start beyond stock, {way.partition(', ')[2]}", beyond, cpu_s=used))
    return rows
