"""action=cache: what lies in the cache folder, with cache.do=verify whether it is sound, with cache.do=prune less."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict

from kt_launch.actions import Job
from kt_launch.actions.page import Page
from kt_launch.commandline.terminal import print_table
from kt_model.errors import EXIT_OK, LaunchError
from kt_model.printable import say
from kt_model.weights.caching import MAKING, UNFINISHED, Item, choose_pruned, prune, read_cache, verify
from kt_model.weights.locations import cache_root

PAGE = Page(
    (
        "Shows what is in the cache folder (KT_LAUNCH_CACHE, else the user's own), with sizes: the experts that "
        "action=quantize made, and the packed cache. A start keeps the experts as the kernels pack them: the files "
        "are written while the server runs, and named by the hashes of the weights, the method and the kernels' "
        "layout. The next start maps them instead of reading and packing the checkpoint's, and all servers on the "
        "host share their pages."
        " kt.packed_cache=off turns it off; action=plan shows the entry.",
        "A start notices an entry that changed since it was written, and writes it again. cache.do=verify "
        "reads everything again. cache.do=prune removes broken and unfinished entries, and with cache.days or "
        "cache.max_gib those that have not been used for long; running servers keep what they have mapped.",
    ),
    (
        ("kt-launch action=cache", "list"),
        ("kt-launch action=cache cache.do=verify", ""),
        ("kt-launch action=cache cache.do=prune cache.days=30 cache.max_gib=100", ""),
    ),
    ("cache.", "listing.format", "kt.packed_cache"),
)

GIB = 2**30


def run(job: Job) -> int:
    settings = job.config.cache
    if settings.do != "prune":
        for key in ("days", "max_gib"):
            if getattr(settings, key) is not None:
                job.problems.add(f"cache.{key}", f"cache.do={settings.do} removes nothing", "Set cache.do=prune.")
    job.problems.raise_if_any()
    items = read_cache(thorough=settings.do == "prune")
    if settings.do == "verify":
        _verify(job, items)
    elif settings.do == "prune":
        max_bytes = None if settings.max_gib is None else int(settings.max_gib * GIB)
        _prune(choose_pruned(items, settings.days, max_bytes))
    else:
        _show(items, job.config.listing.format)
    return EXIT_OK


def _show(items: list[Item], form: str) -> None:
    if form == "json":
        print(json.dumps([asdict(item) | {"path": str(item.path)} for item in items], indent=1))
    elif not items:
        say(f"nothing in {cache_root()}")
    else:
        rows = [
            (item.path.name, item.kind, item.state, size(item.bytes), _day(item.used_s), item.made_from or "-")
            for item in items
        ]
        print_table(("name", "kind", "state", "size", "last used", "from"), rows)
        say(f"\n{size(sum(item.bytes for item in items))} in {cache_root()}")
        for item in items:
            if item.problem:
                say(f"broken: {item.problem}")


def _verify(job: Job, items: list[Item]) -> None:
    for item in items:
        if item.state in (MAKING, UNFINISHED):
            say(f"{item.state}: {item.path}")
            continue
        problem = verify(item)
        say(f"{'broken' if problem else 'intact'}: {item.path} ({size(item.bytes)})")
        if problem:
            where, _, what = problem.partition(": ")
            job.problems.add_error(LaunchError(where, what, "Run kt-launch action=cache cache.do=prune."))
    job.problems.raise_if_any()


def _prune(chosen: Iterable[tuple[Item, str]]) -> None:
    freed = 0
    for item, reason in list(chosen):
        if prune(item):
            freed += item.bytes
            say(f"removed: {item.path} ({size(item.bytes)}): {reason}")
        else:
            say(f"kept: {item.path}: another process is writing it")
    say(f"freed {size(freed)} in {cache_root()}")


def size(count: int) -> str:
    """In GiB where that has digits to show, else in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
