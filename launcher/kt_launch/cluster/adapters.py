"""Adapters on servers that answer as one: loaded on all of them or on none, and reloaded into one that was restarted.
Each server checks and proves an adapter for itself; this file only tracks which server has which, and sends requests.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kt_launch.watching.client import ALONE, LOADING, UNLOADING
from kt_model.contract import ADAPTERS_FILE
from kt_model.errors import LaunchError
from kt_model.jsonfile import read_json_or_empty
from kt_model.printable import printable, say

ANSWER_S = 600.0
"""The server reads and proves the adapter before it answers; unloading waits for the adapter's running requests."""
LIST_S = 30.0
CONNECT_S = 10.0
ALIKE = ("folder", "format", "layout", "rank", "scale", "reaches", "missing_pairs")
"""Facts in a server's answer to a load that must be equal for equal files."""


@dataclass(frozen=True)
class Worker:
    """One of the servers. client: connects to it, with its keys."""

    url: str
    client: httpx.Client


@dataclass(frozen=True)
class Change:
    """The outcome of a change. refused: reasons by server; kept: servers that have the adapter now; found: the servers'
    own answers."""

    success: bool
    message: str
    kept: tuple[str, ...]
    refused: Mapping[str, str]
    found: Mapping[str, Mapping[str, Any]]


def read_adapters(worker: Worker) -> dict[str, str]:
    """Path by name of the adapters that the server lists. Raises LaunchError if it does not answer."""
    try:
        cards = worker.client.get("/v1/models", timeout=LIST_S).raise_for_status().json()["data"]
        return {
            str(card["id"]).removeprefix(f"{card['parent']}:"): str(card["root"]) for card in cards if card["parent"]
        }
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as failure:
        problem = f"{worker.url} does not list its models ({_first_line(failure)})"
        raise LaunchError("adapters", problem, "Wait until all servers answer, and try again.") from failure


def read_all(workers: Sequence[Worker]) -> dict[str, dict[str, str]]:
    """The adapters of each server, by its address."""
    return dict(zip((worker.url for worker in workers), _at_once(read_adapters, workers), strict=True))


def load(workers: Sequence[Worker], name: str, path: str) -> Change:
    """Load on the servers that do not have it yet; if one refuses, it is unloaded from the others again. Raises
    LaunchError, and changes nothing, if one does not answer or has a different adapter of this name."""
    has = read_all(workers)
    asked = {"lora_name": name, "lora_path": _known(has, name, path) or path}
    lacking = [worker for worker in workers if name not in has[worker.url]]
    found, refused = _post_all(lacking, LOADING, asked)
    reasons = refused or _unlike(found)
    if not reasons:
        return Change(True, "", tuple(has), {}, found)
    new = [worker for worker in lacking if worker.url not in refused]
    _, left = _post_all(new, UNLOADING, {"lora_name": name})
    kept = tuple(worker.url for worker in workers if worker not in lacking or worker.url in left)
    where = f"it is on {', '.join(kept)}" if kept else "no server has it"
    return Change(False, f"{name} was not loaded, {where}. {_reasons(reasons)}", kept, reasons, found)


def unload(workers: Sequence[Worker], name: str) -> Change:
    """Unload from the servers that have it. Raises LaunchError if one does not answer, or none has it."""
    having = [worker for worker, names in zip(workers, read_all(workers).values(), strict=True) if name in names]
    if not having:
        raise LaunchError("adapters.unload", f"no server has an adapter {name}", "kt-launch adapters lists them.")
    found, refused = _post_all(having, UNLOADING, {"lora_name": name})
    kept = tuple(refused)
    message = f"{name} is still on {', '.join(kept)}. {_reasons(refused)}" if kept else ""
    return Change(not kept, message, kept, refused, found)


def level(workers: Sequence[Worker]) -> Iterator[str]:
    """Load on each server what all others have; yields what was done, and what could not be done."""
    has = read_all(workers)
    for worker in workers:
        others = [has[other.url] for other in workers if other is not worker]
        common = set.intersection(*(set(each) for each in others)) if others else set()
        for name in sorted(common - set(has[worker.url])):
            answer = _post(worker, LOADING, {"lora_name": name, "lora_path": others[0][name]})
            done = "was loaded" if answer.get("success") else f"is missing: {answer['error_message']}"
            yield f"{worker.url}: adapter {name}, which all others have, {done}"


def say_changed(who: str, healthy: int, workers: Sequence[Worker]) -> None:
    """Print how many servers answer; once all do again, make sure that they have the same adapters."""
    say(f"{who}: {healthy} of {len(workers)} servers answer", file=sys.stderr)
    if healthy == len(workers):
        with contextlib.suppress(LaunchError):  # one has gone again; retried when it is back
            for sentence in level(workers):
                say(f"{who}: {sentence}", file=sys.stderr)


def restore(client: httpx.Client, run_folder: Path) -> None:
    """Give a restarted server the adapters that it had. If one cannot be loaded any more, a warning says so, and the
    server goes on without it."""
    wanted = read_json_or_empty(run_folder / ADAPTERS_FILE)
    if not wanted:
        return
    worker = Worker(str(client.base_url), client)
    try:
        has = read_adapters(worker)
    except LaunchError as failure:
        say(f"warning: adapters that were loaded before are not loaded again: {failure}", file=sys.stderr)
        return
    changed = [(name, path) for name, path in has.items() if wanted.get(name) != path]
    for name, _ in changed:
        _tell(_post(worker, UNLOADING, {"lora_name": name}), f"{name} cannot be unloaded again")
    for name, path in wanted.items():
        if has.get(name) != path:
            _tell(_post(worker, LOADING, {"lora_name": name, "lora_path": path}), f"{name} cannot be loaded again")


def _tell(answer: Mapping[str, Any], problem: str) -> None:
    if not answer.get("success"):
        say(f"warning: adapter {problem}: {answer['error_message']}", file=sys.stderr)


def _known(has: Mapping[str, Mapping[str, str]], name: str, path: str) -> str | None:
    """The path from which other servers loaded it: for a training run, one of its checkpoints. Raises LaunchError if a
    different adapter has this name."""
    known = None
    for url, names in has.items():
        known = names.get(name, known)
        if name in names and not Path(names[name]).resolve().is_relative_to(Path(path).resolve()):
            problem = f"{url} has another adapter {name}, from {names[name]}"
            raise LaunchError("adapters.load", printable(problem), "Choose another name, or unload that one.")
    return known


def _unlike(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Servers that loaded something other than the first one did: hosts have their own files."""
    described = {url: _description(answer.get("adapter") or {}) for url, answer in found.items()}
    first = next(iter(described.values()), {})
    differing = {url: [key for key in ALIKE if facts[key] != first[key]] for url, facts in described.items()}
    return {
        url: "; ".join(f"its {key} is {described[url][key]}, elsewhere {first[key]}" for key in keys)
        for url, keys in differing.items()
        if keys
    }


def _description(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Without the files' location, except the checkpoint's name within a training run."""
    known = {**adapter, "folder": Path(str(adapter.get("path", ""))).name}
    return {key: known.get(key) for key in ALIKE}


def _post(worker: Worker, route: str, content: Mapping[str, str]) -> dict[str, Any]:
    """The server's answer, in the form of SGLang's answers."""
    try:
        answer = worker.client.post(route, json=dict(content))
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return {"success": False, "error_message": "it needs another key (server.admin_key)"}
        said = answer.json()
        reason = said.get("error_message") or said.get("error", {}).get("message") or f"status {answer.status_code}"
        return {**said, "success": bool(said.get("success")), "error_message": printable(str(reason))}
    except (httpx.HTTPError, ValueError, AttributeError) as failure:
        return {"success": False, "error_message": f"it does not answer ({_first_line(failure)})"}


def _post_all(
    workers: Sequence[Worker], route: str, content: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The servers' answers, and why some refuse, by their addresses."""
    answers = _at_once(lambda one: _post(one, route, content), workers)
    found = dict(zip((each.url for each in workers), answers, strict=True))
    return found, {url: str(answer["error_message"]) for url, answer in found.items() if not answer.get("success")}


def _at_once(ask: Callable[[Worker], Any], workers: Sequence[Worker]) -> list[Any]:
    """In the order of the servers."""
    if not workers:
        return []
    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(ask, workers))


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{url}: {reason}" for url, reason in refused.items())


def _first_line(failure: Exception) -> str:
    return printable((str(failure).splitlines() or [type(failure).__name__])[0])


@contextlib.contextmanager
def connected(urls: Sequence[str], auth: httpx.Auth) -> Iterator[list[Worker]]:
    """Clients for servers that share the same keys."""
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)

    def client(url: str) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=timeout, trust_env=False, auth=auth, limits=ALONE)

    with contextlib.ExitStack() as clients:
        places = [url.rstrip("/") for url in urls]
        yield [Worker(url, clients.enter_context(client(url))) for url in places]
