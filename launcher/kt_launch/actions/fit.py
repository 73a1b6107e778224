"""action=fit: estimates how much memory models need, and an upper bound of one request's speed, from config.json alone.
Starts nothing.

`python -m kt_launch.actions.fit > docs/sizing.md` writes the page of the shipped model shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.commandline.terminal import print_table
from kt_launch.config.schema import Config
from kt_launch.gathering.hub import fetch_config
from kt_launch.gathering.rates import HERE, Rates, read_rates, recorded_hosts
from kt_launch.gathering.sizing import Size, sizes_of
from kt_launch.machine.folders import conf_folder
from kt_launch.machine.host import Host, read_host
from kt_launch.planning.locate import locate_model
from kt_launch.planning.threads import usable_threads
from kt_model.checkpoint import require_config
from kt_model.errors import LaunchError
from kt_model.estimated_checkpoint import EstimatedCheckpoint, estimate_checkpoint
from kt_model.installed import missing_packages
from kt_model.nearest import did_you_mean
from kt_model.printable import say
from kt_model.units import GIB

PAGE = Page(
    (
        "Computes from a model's config.json, without its weights, what each method takes: host memory without a GPU, "
        "host memory beside one, memory of a GPU that has everything but the routed experts, and tokens a second of "
        "one request. Norms, adapters and what the system itself takes are left out.",
        "Tokens a second are an upper bound: the bytes that one token reads, at the rate at which our kernels read "
        "experts on this machine (measured now, which takes seconds and needs torch) or on one that was measured "
        "(fit.host=amx, avx2, avx512, xeon512; see [performance](../performance.md)). Beside a GPU only the experts "
        "count; without one the rest of the model is read, too. Across server.nodes hosts each reads its share.",
        "Without a model: the shapes that ship, or those of fit.shapes. [The table](../sizing.md)",
    ),
    (
        ("kt-launch fit model=/models/DeepSeek-V2-Lite-Chat", "on this machine"),
        ("kt-launch fit fit.host=amx", "models that ship as shapes, on a machine that was measured"),
        ("kt-launch fit fit.shapes=[deepseek-v3] fit.host=amx server.tp=2 server.nodes=2", "on two hosts"),
    ),
    (
        *("fit.", "model.path", "model.hub", "model.revision", "paths.models", "kt.cpuinfer", "server.context_length"),
        *("server.max_running_requests", "server.tp", "server.nodes", "format"),
    ),
    data=Data(
        "a list with an object for each model and method",
        (
            ("model", "its name"),
            ("method", "number format of the experts"),
            ("experts_bytes", "routed experts, as the kernels hold them"),
            ("host_bytes", "of host memory without a GPU"),
            ("host_bytes_beside_gpu", "of host memory beside a GPU"),
            ("gpu_bytes", "of a GPU that has everything but the routed experts"),
            ("tokens_per_s", "one request without a GPU, at most"),
            ("tokens_per_s_beside_gpu", "one request beside a GPU, at most"),
            ("rates", "host whose rates were taken"),
            ("free_bytes", "of this machine's memory now"),
        ),
    ),
)
HEADER = ("model", "method", "host GiB", "host GiB with GPU", "GPU GiB", "tokens/s", "tokens/s with GPU")
PAGE_WORDS = "kt-launch fit fit.host=amx kt.cpuinfer=16 kt.threadpool_count=1"


def run(job: Job) -> None:
    config, host = job.config, read_host()
    bases = list(_sketches(job))
    job.problems.raise_if_any()
    name = config.fit.host or _nearest_host(host)
    rates = read_rates(name, bases[0][1], config.kt.cpuinfer or usable_threads(host)[0])
    sizes = [size for name, base in bases for size in sizes_of(name, base, config, host, rates)]
    if job.wants_json:
        known = {"rates": rates.host, "free_bytes": host.free_bytes}
        job.print_json([asdict(size) | known for size in sizes])
    else:
        print_table(HEADER, _rows(sizes))
        say(f"\nrates: {_told(rates)}; {host.free_bytes / GIB:.1f} GiB of this machine's memory are free")


def _sketches(job: Job) -> Iterator[tuple[str, EstimatedCheckpoint]]:
    """The typed model, or shipped shapes."""
    config = job.config
    if not config.fit.shapes and any(text.startswith(("model=", "model.")) for text in job.sources.typed):
        if config.model.hub and not config.model.path:
            file = fetch_config(config)
            yield config.model.name or config.model.hub.rpartition("/")[2], estimate_checkpoint(file, "model")
        else:
            found = locate_model(config, job.sources, os.environ)
            require_config(found.path, "model.path")
            yield found.name, estimate_checkpoint(found.path / "config.json", "model.path")
        return
    for name in config.fit.shapes or shape_names():
        yield name, estimate_checkpoint(_shape_file(name), "fit.shapes")


def shape_names() -> list[str]:
    """The shipped shapes, smallest first."""
    files = sorted((conf_folder() / "shapes").glob("*.json"))
    return sorted(
        (file.stem for file in files), key=lambda name: estimate_checkpoint(_shape_file(name), "").expert_bytes
    )


def _shape_file(name: str) -> Path:
    file = conf_folder() / "shapes" / f"{name}.json"
    if "/" in name or not file.is_file():
        known = [each.stem for each in file.parent.glob("*.json")]
        fix = did_you_mean(name.lower(), known, "kt-launch fit shows those there are.")
        raise LaunchError("fit.shapes", f"no shape {name}", fix)
    return file


def _nearest_host(host: Host) -> str:
    """This machine if it can be measured; else the recorded host with its instruction set."""
    known, isa = recorded_hosts(), host.instruction_set.partition("_")[0]
    return HERE if "torch" not in missing_packages() else isa if isa in known else known[0]


def _told(rates: Rates) -> str:
    return "measured on this machine" if rates.host == HERE else f"as recorded on {rates.host}"


def _rows(sizes: Sequence[Size]) -> list[tuple[str, ...]]:
    return [
        (
            *(size.model, size.method, _gib(size.host_bytes), _gib(size.host_bytes_beside_gpu), _gib(size.gpu_bytes)),
            *(_rate(size.tokens_per_s), _rate(size.tokens_per_s_beside_gpu)),
        )
        for size in sizes
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.0f}"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"


def sizing_page() -> str:
    """docs/sizing.md."""
    host = read_host()
    config = Config.model_validate({"kt": {"cpuinfer": 16, "threadpool_count": 1}, "server": {"device": "cpu"}})
    bases = [(name, estimate_checkpoint(_shape_file(name), "")) for name in shape_names()]
    rates = read_rates("amx", bases[0][1], 16)
    rows = _rows([size for name, base in bases for size in sizes_of(name, base, config, host, rates)])
    table = [f"| {' | '.join(row)} |" for row in (HEADER, tuple("---" for _ in HEADER), *rows)]
    return "\n".join([*INTRODUCTION, "", *table, ""])


INTRODUCTION = f"""\
# Which model fits, and how fast it is at most

<!-- Written by `python -m kt_launch.actions.fit > docs/sizing.md`. -->

Computed, not measured, from each model's config.json, for one launch with four requests of 4096 tokens and no adapters.
Tokens a second are an upper bound for one request: the bytes that a token reads, at the rates that our kernels reached
on 16 processors of an AMX machine that reads 132 GB/s ([performance](performance.md)). Beside a GPU only the experts
count, and the GPU holds everything else in bfloat16; without one, the rest is read by the CPU, too.

    kt-launch fit model=/models/DeepSeek-V2-Lite-Chat    # your model on your machine
    {PAGE_WORDS}    # the table

A real step takes more: of DeepSeek-V2-Lite in BF16 beside an H200 the kernels took 23.1 ms of 25.9 ([GPU](gpu.md)).
""".splitlines()


if __name__ == "__main__":
    print(sizing_page(), end="")
