"""One bench from start to end, in a separate process: `python -m kt_launch.bench.measure <run folder> <parent pid>`.

The run folder holds plan.json, and reference-plan.json if another method is the reference. Results are written to
bench.json after every step, so that an interrupted bench keeps what it has measured.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kt_launch.bench import RECORD_FILE, REFERENCE_METHOD, REFERENCE_PLAN, quality
from kt_launch.bench.client import Load, LoadClient, median_ms, write_prompts
from kt_launch.bench.plausibility import measure_again
from kt_launch.bench.quality import Predictions
from kt_launch.bench.serving import Served
from kt_launch.config.schema import Bench
from kt_launch.machine.memory import Held, MemorySampler, read_shares
from kt_launch.machine.processes import Stopped, pids_below, stopped_by
from kt_launch.proving.passages import text_file
from kt_model.chat_template import read_chat_template
from kt_model.digests import Digests, sha256_of
from kt_model.errors import EXIT_INTERRUPTED, EXIT_OK, BenchFailed, LaunchError, LaunchErrors
from kt_model.jsonfile import write_json
from kt_model.parent_death import die_with_parent
from kt_model.plan import LaunchPlan
from kt_model.system_errors import in_users_words
from kt_model.user_paths import cache_root, expanded

BASE = "base"


class OneBench:
    """The steps of one bench, on the plan in a run folder. measured: the results so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = LaunchPlan.read(folder / "plan.json")
        self.config = Bench.model_validate(self.plan.config["bench"])
        self.measured: dict[str, Any] = {"error": None, "start": None, "memory": None, "loads": [], "quality": []}
        self.targets: list[str | None] = [None, *self.plan.adapters]
        self.work = folder / "bench"
        self.work.mkdir(exist_ok=True)

    def record(self, **results: Any) -> None:
        """Each is written to disk at once."""
        self.measured.update(results)
        write_json(self.folder / RECORD_FILE, self.measured)

    def run(self) -> None:
        """Run every step. Raises LaunchError."""
        self.record()
        references = self._references()
        with Served(self.folder) as served, MemorySampler(partial(pids_below, served.pid)) as memory:
            start = {"ready_s": served.start_s, "phases": served.phases()}
            self.record(start=start, expert_bytes=served.expert_bytes())
            with LoadClient(served.url, self.plan.value("model.path"), self.work) as client:
                for load in self.loads():
                    self._measure_load(load, client, served)
                    self.record(memory=_as_row(memory.peak, None))
            shares = read_shares(pids_below(served.pid))
            if references:
                self._measure_quality(references, served)
            self.record(memory=_as_row(memory.peak, shares))

    def _references(self) -> References | None:
        """Ready to compare with; None if quality is switched off or the references cannot be had."""
        if not self.config.quality:
            return None
        references = References(self)
        return references if references.compute_missing_elsewhere() else None

    def loads(self) -> Iterator[Load]:
        """Each target with each concurrency."""
        config, checkpoint = self.config, Path(self.plan.value("model.path"))
        chat = config.endpoint == "chat" or (config.endpoint == "auto" and bool(read_chat_template(checkpoint)))
        for target in self.targets:
            for concurrency in config.concurrency:
                yield Load(
                    target=target or BASE,
                    model=served_name(self.plan, target),
                    concurrency=concurrency,
                    requests=max(config.requests, concurrency),
                    input_tokens=config.input_tokens,
                    output_tokens=config.output_tokens,
                    warmup=config.warmup,
                    chat=chat,
                )

    def _measure_load(self, load: Load, client: LoadClient, served: Served) -> None:
        prompts = self.work / "prompts.json"
        write_prompts(text_file().read_text(), max(load.requests, 1), prompts)
        try:
            found = measure_again(lambda: client.run(load, prompts), say)
        finally:
            served.require_alive("bench")
        self.record(loads=[*self.measured["loads"], found])
        say(f"{load.target}, {load.concurrency} at once: {_sentence(found)}")
        if found["completed"] < load.requests:
            problem = f"{load.requests - found['completed']} of {load.requests} requests failed: {found['error']}"
            raise BenchFailed("bench", problem, f"the server's log is {self.folder / 'server.log'}")

    def _measure_quality(self, references: References, served: Served) -> None:
        rows = []
        for target in self.targets:
            reference, how = references.get(target, served)
            found = quality.compare(reference, references.ask(served, target))
            rows.append({"target": target or BASE, **found.as_dict(), "reference": how})
            self.record(quality=rows)
            say(f"{target or BASE}: KL to BF16 {found.kl_mean:.2g}, same first choice {found.top1_agreement:.1%}")


class References:
    """The BF16 references of the bench's targets: from the cache, from a BF16 server, or from a first pass on this
    server."""

    def __init__(self, bench: OneBench) -> None:
        self._bench = bench
        self._own = bench.plan.value("kt.method") == REFERENCE_METHOD
        self._files = {target: self._locate(target) for target in bench.targets}

    def compute_missing_elsewhere(self) -> bool:
        """If this bench's server is not the reference itself, start one that is, unless everything is cached. Returns
        whether everything is cached or can be computed."""
        missing = [target for target, file in self._files.items() if not file.is_file()]
        if self._own or not missing:
            return True
        if not (self._bench.folder / REFERENCE_PLAN).is_file():
            return False
        say("the BF16 reference is computed first, by a BF16 server")
        folder = self._bench.work / "reference"
        folder.mkdir(exist_ok=True)
        LaunchPlan.read(self._bench.folder / REFERENCE_PLAN).placed_in(folder).write(folder / "plan.json")
        with Served(folder) as served:
            for target in missing:
                self.ask(served, target).write(self._files[target])
        return True

    def get(self, target: str | None, served: Served) -> tuple[Predictions, dict[str, str]]:
        """The reference, and where it is from."""
        file, by = self._files[target], "an earlier BF16 server"
        if not file.is_file():
            self.ask(served, target).write(file)
            by = "a first pass over the text on this server"
        return Predictions.read(file), {"file": str(file), "sha256": sha256_of(file), "by": by}

    def ask(self, served: Served, target: str | None) -> Predictions:
        return quality.read_predictions(served.client, target, self._bench.config.top_logprobs)

    def _locate(self, target: str | None) -> Path:
        given = self._bench.config.references
        root = expanded(given) if given else cache_root() / "references"
        return root / f"{self._key(target)}.npz"

    def _key(self, target: str | None) -> str:
        plan = self._bench.plan
        adapter = hashes_below(plan.value(f"lora.{target}.path")) if target else {}
        checkpoint = hashes_below(plan.value("model.path"))
        return quality.reference_key(
            checkpoint | kernel_hashes(), adapter, self._bench.config.top_logprobs, plan.value("server.device")
        )


def hashes_below(folder: str) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint or adapter, by name."""
    from kt_launch.runs.lock import READ_SUFFIXES

    files = sorted(file for file in Path(folder).iterdir() if file.suffix in READ_SUFFIXES and file.is_file())
    with Digests() as digests:
        return {file.name: digests.sha256(file) for file in files}


def kernel_hashes() -> dict[str, str]:
    """SHA-256 of the compiled kernels."""
    from kt_launch.runs.lock import kernel_files

    return {file.name: sha256_of(file) for file in kernel_files()}


def served_name(plan: LaunchPlan, adapter: str | None) -> str:
    """What a request names: the model, or an adapter of it."""
    model = str(plan.value("model.name"))
    return f"{model}:{adapter}" if adapter else model


def _as_row(peak: Held, shares: int | None) -> dict[str, int | None]:
    return {"peak_rss_bytes": peak.resident_bytes, "pss_bytes": shares, "processes": peak.processes}


def _sentence(load: Mapping[str, Any]) -> str:
    """The result of a load as one sentence."""
    gap = median_ms(load, "tpot_ms", 1)
    then = f"then one every {gap} ms" if load["tpot_ms"] else "the time between tokens was not measured"
    return f"first token {median_ms(load, 'ttft_ms', 0)} ms, {then}, {load['output_tokens_per_s']:.1f} tokens/s"


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"  bench: {line}", file=sys.stderr, flush=True)


def main(folder: Path, parent: int) -> int:
    """The process's entry point: returns an exit code, and records what went wrong."""
    try:
        with stopped_by(signal.SIGINT, signal.SIGTERM):
            die_with_parent(parent)
            return _measure(OneBench(folder))
    except Stopped:
        return EXIT_INTERRUPTED


def _measure(bench: OneBench) -> int:
    """A failure goes into the record if the disk accepts it, else to the terminal."""
    try:
        with in_users_words():
            bench.run()
        return EXIT_OK
    except (LaunchError, LaunchErrors) as failure:
        try:
            bench.record(error=str(failure))
        except OSError:
            say(f"error: {failure}")
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
