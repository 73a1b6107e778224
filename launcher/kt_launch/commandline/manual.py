"""A page for each action: what it does, examples, the keys that it reads. Shown by `kt-launch --help action=plan`;
`python -m kt_launch.commandline.manual docs/actions` writes the same pages as Markdown.

The keys' help is their docstring in config.py; only what a key's help cannot say stands here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_launch.config.actions import ACTIONS
from kt_launch.config.schema import read_fields

LAUNCH_KEYS = ("model.", "lora.", "kt.", "server.", "proof.", "paths.")
ADAPTER_KEYS = (
    *("model.path", "model.folder", "paths.models", "paths.loras"),
    *("lora.adapters", "lora.path", "lora.name", "lora.layout"),
)
RUN_KEYS = ("run", "paths.runs")
WRITTEN_BY = (
    "<!-- Written by `python -m kt_launch.commandline.manual docs/actions`; change "
    "launcher/kt_launch/commandline/manual.py instead. -->"
)


@dataclass(frozen=True)
class Page:
    """text: paragraphs. examples: commands and what each is for. keys: those it reads, or prefixes ending in a dot.
    picture: whether docs/pictures has one of it."""

    text: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    keys: tuple[str, ...] = ()
    picture: bool = False


PAGES: Mapping[str, Page] = {
    "serve": Page(
        (
            "Resolves the plan, checks it against the files and the machine, starts SGLang in a session of its own, "
            "follows its log phase by phase, asks it for a real token and proves that experts and adapters act: each "
            "scheduler process reports which of our classes stand where and what ran through them, one token is "
            "recomputed in float32, base and adapter must give different first-token logprobs, and base and every "
            "adapter must predict a shipped text with finite, unequal logprobs, the base better than by chance. Only "
            "then it says ready.",
            "A checkpoint of up to proof.whole_model_gib is also held against the whole model: while the server "
            "loads, transformers runs it in float32 on the CPU, in a process of its own, with and without each "
            "adapter (by PEFT where it is installed and reads that adapter as it was trained), and the logprobs at "
            "720 positions of random prompts must be those that bfloat16's rounding allows. The lines that begin "
            "with proof: say what was checked, what was not and why; proof.json in the run's folder has the numbers.",
            "Every run has a folder with the plan, the lock (versions, hashes, machine), logs, proof, timings and "
            "peak memory. Ctrl-C or SIGTERM ends the server and every process of it.",
            "With -m the servers come one after another: each is started, proven and ended, and the exit code is that "
            "of the worst. detach=true leaves them running instead.",
            "An adapter's folder may be that of its training: without an adapter_config.json of its own it means its "
            "newest checkpoint-N, and the plan says which. Files around it that look like weights are named, not read.",
            "Adapters may also come and go while it runs: see [hot loading](../hot-loading.md).",
        ),
        (
            ("kt-launch", "the shipped demo model and its adapter"),
            ("kt-launch model=deepseek_v2_lite lora=west_all", "presets; folders below KT_LAUNCH_MODELS"),
            (
                "kt-launch model=auto model.path=/models/DeepSeek-V2-Lite-Chat lora.path=/adapters/west lora.name=west",
                "any checkpoint and adapter",
            ),
            ("kt-launch model=deepseek_v2_lite lora=none kt.method=AMXINT8_SFT kt.prepare=true", "int8 experts"),
            ("kt-launch model=deepseek_v2_lite lora=none lora.max_rank=16", "room for adapters to come"),
            ("kt-launch detach=true server.restarts=3 server.metrics_port=9100", "in the background, watched"),
            (
                "kt-launch -m model=deepseek_v2_lite lora=west_all kt.prepare=true "
                "kt.method=AMXBF16_SFT,AMXINT8_SFT,AMXINT4_SFT",
                "does each method come up, and does the adapter act in each",
            ),
        ),
        (*LAUNCH_KEYS, "detach"),
    ),
    "plan": Page(
        (
            "Shows every value of the launch with where it came from (default, preset file, command line, environment, "
            "probed, derived), what it takes of each memory against what is free there, the warnings, and the exact "
            "command. Starts nothing and imports neither torch nor SGLang, so it answers in half a second.",
            "plan.format=json prints one object: config, resolved (key to value and source), argv, env, warnings.",
        ),
        (
            ("kt-launch action=plan model=deepseek_v2_lite lora=west_all", "before the first start"),
            ("kt-launch action=plan plan.format=json", "for programs"),
            ("kt-launch -m action=plan kt.cpuinfer=1,2", "several, one after another"),
        ),
        (*LAUNCH_KEYS, "plan."),
        picture=True,
    ),
    "inspect": Page(
        (
            "Reads the chosen adapters as serving would and reports them: format, ranks, effective scale, layers and "
            "experts covered, what is served as zero, norms of the weight changes, bytes. Every key of the files is "
            "counted once, by where it goes: routed experts (ours), attention, shared experts and dense MLP (SGLang's "
            "own LoRA), or refused, with the reason.",
            "Of fused experts it tells in which order the columns of B are read, and why: rank_major is PEFT's, "
            "grouped_by_expert that of Unsloth before 17 September 2026, whose files look the same. lora.layout, or "
            "lora.adapters.<name>.layout for one of several, says it where files and values do not.",
        ),
        (
            ("kt-launch action=inspect", "the demo's adapter"),
            ("kt-launch action=inspect model=deepseek_v2_lite lora=west_all inspect.format=json", "for programs"),
        ),
        (*ADAPTER_KEYS, "inspect."),
        picture=True,
    ),
    "quantize": Page(
        (
            "Reads the routed experts of a checkpoint (BF16, FP16 or FP8) one layer at a time and writes "
            "them as int8 (a scale per output row) or int4 (a scale per 32 inputs) into a folder of safetensors shards "
            "with a manifest of shapes, method and SHA-256 per shard. It continues where a kill stopped it; a folder "
            "counts only when it is whole. Each layer's error (relative L2, worst expert) is shown and kept.",
            "Without kt.weight_path the folder lies in the cache (KT_LAUNCH_CACHE), where serve looks for it; it "
            "also finds one beside the model, as <model>-CPU-weight-INT8. What kt-kernel packed under such a name is "
            "for its own tiles: it is told, and not used.",
        ),
        (
            ("kt-launch action=quantize model=deepseek_v2_lite kt.method=AMXINT8_SFT", "into the cache"),
            (
                "kt-launch action=quantize model=deepseek_v2_lite kt.method=AMXINT4_SFT kt.weight_path=/weights/int4",
                "into a folder of yours",
            ),
        ),
        ("model.path", "model.folder", "paths.models", "kt.method", "kt.weight_path", "kt.cpuinfer"),
    ),
    "merge": Page(
        (
            "Writes the checkpoint with one adapter baked into every matrix that it reaches, streaming and atomic as "
            "quantize is. For engines without adapters, and as the reference to hold served adapters against.",
            "A checkpoint in FP8, with a scale for each tensor, row or block, becomes BF16 on the way, with lora=none "
            "too: serve takes the copy. Experts that lie fused become single ones, which every engine reads.",
        ),
        (
            ("kt-launch action=merge model=deepseek_v2_lite lora=west_all merge.path=/models/merged", ""),
            (
                "kt-launch action=merge model.path=/models/V3 lora=none model=auto merge.path=/models/V3-BF16",
                "FP8 to BF16, no adapter",
            ),
        ),
        (*ADAPTER_KEYS, "merge."),
    ),
    "cache": Page(
        (
            "Shows what lies in the cache folder (KT_LAUNCH_CACHE, else the user's own), with sizes: the experts that "
            "action=quantize made, and the packed cache. A start keeps the experts as the kernels pack them, written "
            "beside the running server, named by the hashes of the weights, the method and the kernels' layout; the "
            "next start maps these files in place of reading and packing the checkpoint's, and all servers of the host "
            "share their pages. kt.packed_cache=off turns it off; action=plan shows the entry.",
            "An entry that changed since it was written is noticed at the start and written anew. cache.do=verify "
            "reads everything again. cache.do=prune removes what is broken or unfinished, and with cache.days or "
            "cache.max_gib what was not served from for long; running servers keep what they have mapped.",
        ),
        (
            ("kt-launch action=cache", "list"),
            ("kt-launch action=cache cache.do=verify", ""),
            ("kt-launch action=cache cache.do=prune cache.days=30 cache.max_gib=100", ""),
        ),
        ("cache.", "listing.format", "kt.packed_cache"),
    ),
    "bench": Page(
        (
            "Starts the server as serve does, drives it with SGLang's own benchmark client, and records time to the "
            "first token, time per token, throughput, peak memory, start time, and how far the answers' probabilities "
            "are from those of a BF16 server (KL, top-1 agreement). With -m each combination is a row, a failure too, "
            "and the end is a table and an HTML page; see [Benches and sweeps](../sweeps.md).",
        ),
        (
            ("kt-launch action=bench bench.concurrency=[1,4]", "one launch"),
            (
                "kt-launch -m kt.method=AMXBF16_SFT,AMXINT8_SFT,AMXINT4_SFT kt.prepare=true action=bench",
                "compare the methods",
            ),
        ),
        (*LAUNCH_KEYS, "bench.", "sweep."),
    ),
    "explain": Page(
        (
            "One key, or all: its value in this launch, its source, its meaning, the rule that gives it when it is "
            "left open, and what would change it.",
        ),
        (
            ("kt-launch action=explain key=kt.cpuinfer", "one key"),
            ("kt-launch action=explain key=kt.weight_path kt.method=AMXINT8_SFT", "under other choices"),
            ("kt-launch action=explain key=lora.west", "all that begins with it, what only the plan knows too"),
            ("kt-launch action=explain", "all of them"),
        ),
        ("key", *LAUNCH_KEYS),
        picture=True,
    ),
    "doctor": Page(
        (
            "Checks Python, torch, SGLang and every place of it that the plugin needs (by signature, not by version), "
            "the wheel's instruction sets against the CPU, one forward of each method against float64 on this very "
            "machine, the AMX permission, huge pages, memory bandwidth, GPU, ports, disk and permissions. Each finding "
            "is pass, warn or fail, with what to do. Exit code 0 only when nothing fails. Ports and folders are those "
            "of the config: typed ones, or the defaults.",
        ),
        (("kt-launch action=doctor", "a table"), ("kt-launch action=doctor doctor.format=json", "for programs")),
        ("doctor.", "server.host", "server.port", "server.metrics_port", "paths.runs"),
        picture=True,
    ),
    "schema": Page(
        ("Prints the JSON schema of the whole config; editors complete and check presets with it.",),
        (("kt-launch action=schema", ""),),
    ),
    "runs": Page(
        ("Lists the recorded runs, oldest first: state, model, adapters, method, seconds to ready, address, ending.",),
        (("kt-launch action=runs", ""), ("kt-launch action=runs listing.format=json", "for programs")),
        ("paths.runs", "listing."),
    ),
    "status": Page(
        ("How one run fares: state, address, processes, metrics, every start of it and how that ended.",),
        (("kt-launch action=status", "the latest living run"), ("kt-launch action=status run=RUN", "this one")),
        (*RUN_KEYS, "listing."),
    ),
    "logs": Page(
        ("The last lines of a run's server log; logs.follow=true goes on until the run ends.",),
        (("kt-launch action=logs", ""), ("kt-launch action=logs run=RUN logs.lines=50", "")),
        (*RUN_KEYS, "logs."),
    ),
    "stop": Page(
        (
            "Ends a run: its launcher first, then whatever is left of its server. A process number that belongs to "
            "something else by now is left alone.",
        ),
        (("kt-launch action=stop", "the latest living run"), ("kt-launch action=stop run=RUN", "this one")),
        RUN_KEYS,
    ),
    "replay": Page(
        (
            "Starts a recorded run again, from any folder, with identical arguments and environment, as a new run. "
            "What differs today is named first: package versions, git state, CPU and GPU, and every file of checkpoint "
            "and adapter whose hash changed.",
        ),
        (
            ("kt-launch action=replay run=RUN", ""),
            ("kt-launch action=replay run=RUN replay.start=false", "only tell what differs"),
        ),
        (*RUN_KEYS, "replay.", "detach"),
    ),
    "diff": Page(
        ("What differs between two recorded runs: values, command, environment, machine, packages, files.",),
        (("kt-launch action=diff runs=[RUN,OTHER]", ""),),
        ("runs", "paths.runs", "listing."),
    ),
    "export": Page(
        (
            "A launch as a systemd unit, a Dockerfile, a compose file or a Kubernetes manifest, with its resources "
            "from the plan's estimate and its secrets left to the environment; or the Grafana dashboard of our "
            "metrics.",
        ),
        (
            ("kt-launch action=export export.format=systemd", "to the terminal"),
            ("kt-launch action=export export.format=grafana", "the dashboard"),
        ),
        ("export.", *LAUNCH_KEYS),
    ),
}


def keys_of(page: Page) -> Iterator[tuple[str, str]]:
    """(key, help) of what the action reads, in the config's order."""
    for key, field in read_fields():
        if any(key == wanted or (wanted.endswith(".") and key.startswith(wanted)) for wanted in page.keys):
            yield key, field.description or ""


def action_help(name: str) -> str:
    """The page for the terminal."""
    page = PAGES[name]
    width = max(len(command) for command, _ in page.examples)
    examples = [f"  {command:<{width}}  {meaning}".rstrip() for command, meaning in page.examples]
    keys = [f"  {key:<30} {meaning}" for key, meaning in keys_of(page)]
    paragraphs = [part for text in page.text for part in (text, "")]
    parts = [f"action={name}: {ACTIONS[name]}", "", *paragraphs, "Examples:", *examples]
    return "\n".join([*parts, "", "Keys:", *keys] if keys else parts)


def markdown_page(name: str) -> str:
    """The page for docs/actions."""
    page = PAGES[name]
    parts = [f"# action={name}", WRITTEN_BY, f"{ACTIONS[name][0].upper()}{ACTIONS[name][1:]}.", *page.text]
    commands = [f"    {command}" + (f"    # {meaning}" if meaning else "") for command, meaning in page.examples]
    parts.append("\n".join(commands))
    if page.picture:
        parts.append(f"![What kt-launch action={name} prints](../pictures/{name}.svg)")
    if keys := list(keys_of(page)):
        rows = [f"| `{key}` | {meaning.replace('|', chr(92) + '|')} |" for key, meaning in keys]
        parts.append("\n".join(["| key | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def index_page() -> str:
    """docs/actions/README.md."""
    rows = [f"| [{name}]({name}.md) | {summary} |" for name, summary in ACTIONS.items()]
    table = "\n".join(["| action | |", "| --- | --- |", *rows])
    return "\n\n".join(["# Actions", WRITTEN_BY, "`kt-launch --help action=NAME` shows the same pages.", table]) + "\n"


def markdown_files() -> dict[str, str]:
    """File name -> contents of docs/actions."""
    return {"README.md": index_page()} | {f"{name}.md": markdown_page(name) for name in ACTIONS}


def main(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in markdown_files().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
