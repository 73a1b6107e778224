"""action=cache: lists the cache folder; with cache.do=verify checks it, with cache.do=prune removes parts of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.commandline.terminal import print_table
from kt_model.errors import LaunchError
from kt_model.printable import say
from kt_model.units import GIB
from kt_model.user_paths import cache_root
from kt_model.weights.caching import BROKEN, MAKING, UNFINISHED, Item, choose_pruned, prune, read_cache, verify

PAGE = Page(
    (
        "Shows what is in the cache folder (KT_LAUNCH_CACHE, else the user's own), with sizes: the experts that "
        "kt-launch quantize made, and the packed cache. A start keeps the experts as the kernels pack them: the files "
        "are written while the server runs, and named by the hashes of the weights, the method and the kernels' "
        "layout. The next start maps them instead of reading and packing the checkpoint's, and all servers on the "
        "host share their pages. kt.packed_cache=off turns it off; kt-launch plan shows the entry.",
        "A start notices an entry that changed since it was written, and writes it again. cache.do=verify "
        "reads everything again. cache.do=prune removes broken and unfinished entries, and with cache.days or "
        "cache.max_gib those that have not been used for long; running servers keep what they have mapped.",
    ),
    (
        ("kt-launch cache", "list"),
        ("kt-launch cache cache.do=verify", ""),
        ("kt-launch cache cache.do=prune cache.days=30 cache.max_gib=100", ""),
    ),
    ("cache.", "format", "kt.packed_cache"),
    data=Data(
        "a list with an object for each folder of the cache; with cache.do=prune, for each that was to be removed",
        (
            ("path", "the folder"),
            ("kind", "packed or quantized"),
            ("state", "as in the table; after cache.do=prune also removed or kept"),
            ("bytes", "what it takes"),
            ("used_s", "when it was last used, in seconds since 1970"),
            ("made_from", "folder that packed experts were read from, or null"),
            ("problem", "what is wrong with it, or why it was removed, or null"),
        ),
    ),
)


def run(job: Job) -> None:
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
        _prune(job, choose_pruned(items, settings.days, max_bytes))
    elif job.wants_json:
        job.print_json([_plain(item) for item in items])
    else:
        _show(items)


def _plain(item: Item, **changed: str | None) -> dict[str, Any]:
    return asdict(item) | {"path": str(item.path)} | changed


def _show(items: list[Item]) -> None:
    if not items:
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
    found = []
    for item in items:
        if item.state in (MAKING, UNFINISHED):
            found.append(_plain(item))
            _tell(job, f"{item.state}: {item.path}")
            continue
        problem = verify(item)
        found.append(_plain(item, state=BROKEN if problem else item.state, problem=problem or None))
        _tell(job, f"{'broken' if problem else 'intact'}: {item.path} ({size(item.bytes)})")
        if problem:
            where, _, what = problem.partition(": ")
            job.problems.add_error(LaunchError(where, what, "Run kt-launch cache cache.do=prune."))
    if job.wants_json:
        job.print_json(found)
    job.problems.raise_if_any()


def _prune(job: Job, chosen: Iterable[tuple[Item, str]]) -> None:
    found, freed = [], 0
    for item, reason in list(chosen):
        if prune(item):
            freed += item.bytes
            found.append(_plain(item, state="removed", problem=reason))
            _tell(job, f"removed: {item.path} ({size(item.bytes)}): {reason}")
        else:
            found.append(_plain(item, state="kept", problem="another process is writing it"))
            _tell(job, f"kept: {item.path}: another process is writing it")
    if job.wants_json:
        job.print_json(found)
    _tell(job, f"freed {size(freed)} in {cache_root()}")


def _tell(job: Job, line: str) -> None:
    """Print each step as it is done; JSON reports them at the end."""
    if not job.wants_json:
        say(line)


def size(count: int) -> str:
    """In GiB if that shows enough digits, else in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
