"""A soak: one real server under load for so many minutes, while adapters come and go; every answer is compared with the
one that was given at the start, and memory must not grow.

make soak-served SOAK='[--minutes 30] [--seed N]'
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import httpx
from lives import Life
from outcomes import Outcome
from place import Place, Wrong
from safetensors.torch import load_file, save_file
from servers import shipped_adapter

from kt_launch.machine.memory import read_held
from kt_launch.watching.client import ALONE

CLIENTS = 4
SCALES = {"west": 1.0, "half": 0.5, "more": 1.25}
"""Adapters that come and go: the shipped one with its B multiplied."""
QUESTIONS = tuple(f"What is the capital of {country}?" for country in ("France", "Italy", "Spain", "Egypt"))
"""The demo has learnt them: no answer hangs on the last bit of a sum, which depends on what else is in the batch."""
MOST_GROWTH_MIB = 64
"""Of the server's processes together, from the second tenth of the time to the last: caches of Python and of the
allocator settle in the first. 40 of it are the demo's KV cache, whose pages the kernel gives when they are first used.
Ten KiB lost with each request would be more in half an hour."""


class Soak:
    """The load, and what was found."""

    def __init__(self, life: Life, seed: int, deadline: float) -> None:
        self.life, self._seed, self._deadline = life, seed, deadline
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int]] = []
        self.expected: dict[tuple[str, str], str] = {}
        self._folders = {name: self._write(name, scale) for name, scale in SCALES.items()}
        self._lock = threading.Lock()

    def record(self, client: httpx.Client) -> None:
        """The answers of the start: of the base, and of each adapter, loaded under another name."""
        for name in ("", *SCALES):
            model = self._load(client, name, f"first-{name}") if name else "demo"
            for question in QUESTIONS:
                self.expected[name, question] = self._ask(client, model, question)
            if name:
                self._unload(client, f"first-{name}")

    def run(self) -> None:
        """Until the time is over."""
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(CLIENTS)]
        for worker in workers:
            worker.start()
        processes = [part.pid for name in ("main", "scheduler", "detokenizer") if (part := self.life.part(name))]
        while any(worker.is_alive() for worker in workers):
            self.samples.append((time.monotonic(), read_held(processes).kept_bytes))
            time.sleep(1)

    def growth_mib(self) -> float:
        """From the second tenth of the time to the last."""
        tenth = max(len(self.samples) // 10, 1)
        return _median_mib(self.samples[-tenth:]) - _median_mib(self.samples[tenth : 2 * tenth])

    def thirds_mib(self) -> tuple[float, float]:
        """Of the first third of the time, and of the last."""
        third = max(len(self.samples) // 3, 1)
        return _median_mib(self.samples[:third]), _median_mib(self.samples[-third:])

    def _work(self, number: int) -> None:
        """Loads an adapter under a name of its own, asks it and the base, unloads it."""
        rng = Random(self._seed + number)
        with httpx.Client(base_url=self.life.url, timeout=120, trust_env=False, limits=ALONE) as client:
            while time.monotonic() < self._deadline:
                name, own = rng.choice(tuple(SCALES)), f"soak{number}"
                try:
                    model = self._load(client, name, own)
                    for _ in range(rng.choice((1, 2, 4))):
                        chosen = rng.choice(("", name, name))
                        self._compare(client, chosen, model if chosen else "demo", rng.choice(QUESTIONS))
                    self._unload(client, own)
                except (httpx.HTTPError, KeyError) as failure:
                    self._note(f"{type(failure).__name__}: {failure}")
                    return

    def _compare(self, client: httpx.Client, name: str, model: str, question: str) -> None:
        answer = self._ask(client, model, question)
        self.counts["compared"] += 1
        if answer != self.expected[name, question]:
            self._note(f"{name or 'base'}, {question}: {answer!r}, expected {self.expected[name, question]!r}")

    def _ask(self, client: httpx.Client, model: str, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    def _load(self, client: httpx.Client, name: str, own: str) -> str:
        body = {"lora_name": own, "lora_path": str(self._folders[name])}
        client.post("/load_lora_adapter", json=body).raise_for_status()
        self.counts["swaps"] += 1
        return f"demo:{own}"

    def _unload(self, client: httpx.Client, own: str) -> None:
        client.post("/unload_lora_adapter", json={"lora_name": own}).raise_for_status()

    def _write(self, name: str, scale: float) -> Path:
        folder = self.life.allowed / name
        shutil.copytree(shipped_adapter(), folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {key: each * scale if ".lora_B." in key else each for key, each in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        return folder

    def _note(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)
            print(f"soak: wrong: {text}", flush=True)


def _median_mib(samples: list[tuple[float, int]]) -> float:
    return statistics.median(size for _, size in samples) / 2**20


def soak(place: Place, minutes: float, seed: int) -> bool:
    """Whether all of it held."""
    with Life(place, Outcome("soak"), "server.restarts=0", "lora.max_per_batch=6") as life:
        life.wait_ready()
        found = Soak(life, seed, time.monotonic() + 60 * minutes)
        with httpx.Client(base_url=life.url, timeout=120, trust_env=False, limits=ALONE) as client:
            found.record(client)
        found.run()
        same = life.ask() == life.expected
        life.end(signal.SIGINT)
    growth, (first, last) = found.growth_mib(), found.thirds_mib()
    print(
        f"soak: {minutes:g} minutes, {found.counts['compared']} answers compared, {len(found.wrong)} wrong, "
        f"{found.counts['swaps']} adapters loaded and unloaded, memory grew by {growth:.1f} MiB "
        f"(at most {MOST_GROWTH_MIB}) to {found.samples[-1][1] >> 20} MiB; median of the first third {first:.0f} MiB, "
        f"of the last {last:.0f} MiB; {os.cpu_count()} cores",
        flush=True,
    )
    return same and not found.wrong and growth <= MOST_GROWTH_MIB and found.counts["compared"] > 0


def main() -> int:
    reader = argparse.ArgumentParser()
    reader.add_argument("--minutes", type=float, default=30.0)
    reader.add_argument("--seed", type=int, default=0)
    asked = reader.parse_args()
    place = Place()
    try:
        held = soak(place, asked.minutes, asked.seed)
        left = place.late_processes() + place.left_files()
    except Wrong as failure:
        print(f"soak: {failure}")
        return 1
    finally:
        place.close()
    for each in left:
        print(f"soak: left behind: {each}")
    return 0 if held and not left else 1


if __name__ == "__main__":
    sys.exit(main())
